"""TMA descriptors (CUtensorMap): encoded on the host by the driver, passed to kernels by value (`core.params.tensor_map`)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, DType

BYTES = 128
_ALIGNMENT = 64  # of the buffer that the driver fills
_TYPES = {FLOAT8_E4M3: 0, FLOAT16: 6, BFLOAT16: 9}  # CUtensorMapDataType; bytes are bytes
_INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTE_L2_256B, _FILL_ZEROS = 0, 3, 3, 0
_MAX_STRIDE = 1 << 40
_MAX_EXTENT = 1 << 32


def encodable(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether TMA can read such a tensor: 16-byte aligned, no empty axis, positive outer strides below 2^40 bytes (axes of size 1: any).

    Parameters
    ----------
    address
        Of element 0.
    shape, strides
        Innermost axis first; strides in elements, of the outer axes only.
    """
    return (
        address % 16 == 0
        and all(0 < n <= _MAX_EXTENT for n in shape)
        and all(n == 1 or (0 < s * itemsize < _MAX_STRIDE and s * itemsize % 16 == 0) for n, s in zip(shape[1:], strides, strict=True))
    )  # fmt: skip


@functools.cache
def _encoder() -> Any:
    from pyinfer.core.launch import _driver

    function = _driver().cuTensorMapEncodeTiled
    function.restype = ctypes.c_int
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return function


@functools.lru_cache(maxsize=4096)
def encode(address: int, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The 128 bytes that describe boxes of a tensor in global memory, 128-byte swizzled in shared memory; zeros outside the tensor.

    Parameters
    ----------
    address
        Of element 0, a multiple of 16.
    dtype
        float16, bfloat16 or float8_e4m3fn.
    shape, strides
        Innermost axis first; strides in elements, of the outer axes only.
    box
        Elements per axis, at most 256 each; the innermost ones 128 bytes.

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    rank, size = len(shape), dtype.itemsize
    if not encodable(address, shape, strides, size):
        raise ValueError(f"tensor map: no TMA over shape {shape}, strides {strides} at {address:#x}")
    # An axis of size 1 may have any stride, which the driver would refuse.
    steps = [max(s * size, 16) if n > 1 else 16 for n, s in zip(shape[1:], strides, strict=True)]
    raw = ctypes.create_string_buffer(BYTES + _ALIGNMENT)
    start = -ctypes.addressof(raw) % _ALIGNMENT
    arrays = (
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
    )
    code = _encoder()(
        ctypes.addressof(raw) + start, _TYPES[dtype], rank, address, *(ctypes.addressof(a) for a in arrays),
        _INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTE_L2_256B, _FILL_ZEROS,
    )  # fmt: skip
    if code:
        from pyinfer.core.launch import _check

        _check(code, f"cuTensorMapEncodeTiled of shape {shape}, strides {strides}, box {box}")
    return raw.raw[start : start + BYTES]


MOST_ADDRESSES = 512
"""Maps that a table keeps; beyond, it begins anew."""


class Maps(dict[int, bytes]):
    """`encode` of tensors that differ in their address alone, by address: what a layer's keys and values cost from the second step on."""

    def __init__(self, *layout: Any) -> None:
        self._layout = layout

    def __missing__(self, address: int) -> bytes:
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        found = self[address] = encode(address, *self._layout)
        return found


@functools.lru_cache(maxsize=256)
def table(dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Maps:
    """The table of a layout; arguments as `encode`'s."""
    return Maps(dtype, shape, strides, box)
