"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), on the CPU.

The twin of cuda_src/common/philox.cuh: same key and counter, same bits. Every operand is made a uint64 first, constants too: Numba turns an
operation on a signed and an unsigned 64-bit integer into float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyinfer.cpu.compile import kernel

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)


@kernel(fastmath=False)
def philox4x32_10(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds on the counter (c0, c1, c2, c3) under the key (k0, k1): four 32-bit words, each in a uint64."""
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    key0, key1 = np.uint64(k0), np.uint64(k1)
    for _ in range(10):
        product0 = _M0 * x0  # 32 x 32 bits: fits
        product1 = _M1 * x2
        x0, x1, x2, x3 = (
            (product1 >> _HALF) ^ x1 ^ key0,
            product1 & _MASK,
            (product0 >> _HALF) ^ x3 ^ key1,
            product0 & _MASK,
        )
        key0 = (key0 + _W0) & _MASK
        key1 = (key1 + _W1) & _MASK
    return x0, x1, x2, x3


@kernel(fastmath=False)
def uniform_bits(seed: Any, offset: Any, word: Any) -> Any:
    """64 uniform bits of stream `seed` (64-bit key) at position `offset` (64-bit, low half of the counter); `word` is counter word 2."""
    s = np.uint64(seed)
    o = np.uint64(offset)
    x0, x1, _, _ = philox4x32_10(o & _MASK, o >> _HALF, np.uint64(word), np.uint64(0), s & _MASK, s >> _HALF)
    return (x1 << _HALF) | x0


@kernel(fastmath=False)
def scale_bits(bits: Any, n: Any) -> Any:
    """floor(bits * n / 2^64) for 64 uniform bits and 0 < n < 2^63: an integer uniform on 0..n-1 up to a bias below n / 2^64."""
    b = np.uint64(bits)
    m = np.uint64(n)
    b0, b1, m0, m1 = b & _MASK, b >> _HALF, m & _MASK, m >> _HALF
    middle = b1 * m0 + ((b0 * m0) >> _HALF)  # at most (2^32-1)^2 + 2^32-1: fits
    other = b0 * m1 + (middle & _MASK)
    return np.int64(b1 * m1 + (middle >> _HALF) + (other >> _HALF))
