"""The online softmax both attention kernels share, in base 2, on rows of float32 scores.

Scores arrive as s * log2(e) where s is the scaled logit, so that exp2 and log2 are the only transcendentals. Masked is a real -inf: a row that has seen
no key yet has maximum -inf and sum 0, and nothing here forms inf - inf.
"""

from __future__ import annotations

import math

import numpy as np

from pyinfer.cpu.compile import FASTMATH, kernel

LOG2E = math.log2(math.e)
U = np.uint64  # unsigned indices: Numba drops the test for negative ones, without which no loop here would vectorise

_MAX = np.float32(np.finfo(np.float32).max)
_NEG_INF = np.float32(-np.inf)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_MAGIC = np.float32(1.5 * 2**23)  # adding it rounds to the nearest integer, which then stands in the low bits
_MAGIC_BITS = np.int32(0x4B400000)
_UNDERFLOW = np.float32(-126)
# 2^f on [-1/2, 1/2], relative error 2e-9 before rounding (least squares, reweighted to equal ripple).
_C1, _C2, _C3 = np.float32(0.6931471824645996), np.float32(0.24022646248340607), np.float32(0.05550328642129898)
_C4, _C5, _C6 = np.float32(0.009618489071726799), np.float32(0.0013399932067841291), np.float32(0.00015345809515565634)


@kernel(fastmath=frozenset({"contract"}))  # reassociation would cancel the magic number
def exp2(x):
    """2^x for x <= 126, to 1e-7 relative; 0 below -126, NaN stays. Branch-free, so it vectorises (libm's exp2f would be a call an element)."""
    t = x + _MAGIC
    f = x - (t - _MAGIC)
    p = _C6
    p = p * f + _C5
    p = p * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _ONE
    n = np.int32(
        np.float32(t).view(np.int32) - _MAGIC_BITS
    )  # cast: Numba widens integer arithmetic to 64 bits, and LLVM narrows it again
    scale = np.int32((n + 127) << 23).view(np.float32)
    return _ZERO if x < _UNDERFLOW else p * scale


@kernel(
    fastmath=FASTMATH | {"nnan"}
)  # without nnan LLVM keeps a maximum scalar. A NaN score is still NaN after exp2, whatever maximum came out here.
def _row_max(s, begin, end):
    m = _NEG_INF
    for j in range(begin, end):
        m = max(m, s[j])
    return m


@kernel
def softmax_row(s, base, pad_begin, begin, end, pad_end, m):
    """One online-softmax step over one row's logits (`variants.transform_row` has made them).

    Parameters
    ----------
    s : float32 array
        Logits at [base + begin, base + end), in base-2 units, -inf where masked; overwritten with 2^(s - new maximum).
    pad_begin, begin, end, pad_end : uint64
        [begin, end) is visible; the rest of [pad_begin, pad_end) becomes 0.
    m : float32
        The row's maximum so far.

    Returns
    -------
    m, total : float32
        The new maximum, and the sum of the row's new weights.
    """
    for j in range(base + pad_begin, base + begin):
        s[j] = _ZERO
    for j in range(base + end, base + pad_end):
        s[j] = _ZERO
    first = base + begin
    last = base + end
    new = max(m, _row_max(s, first, last))
    if new == _NEG_INF:  # nothing visible, or every visible score is -inf
        for j in range(first, last):
            s[j] = _ZERO
        return new, _ZERO
    if new > _MAX:  # +inf counts as the largest float, so that its weight is 1, not inf - inf
        new = _MAX
        for j in range(first, last):
            s[j] = _MAX if s[j] > _MAX else s[j]
    total = _ZERO
    for j in range(first, last):
        p = exp2(s[j] - new)
        s[j] = p
        total += p
    return new, total


@kernel
def rescale_factor(old, new):
    """2^(old - new): what a row's sum and output so far are worth under a new maximum; 1 while nothing has been seen."""
    if old == new or old == _NEG_INF:
        return _ONE if old == new else _ZERO
    return exp2(max(old - new, np.float32(-200)))


@kernel
def lse_of(m, total):
    """log2 of a row's sum of weights: m + log2(total), -inf for a row with no visible key."""
    if total == _ZERO:
        return _NEG_INF
    return np.float32(np.float64(m) + math.log2(np.float64(total)))
