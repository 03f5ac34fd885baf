"""Booleans into bits: custom masks are passed packed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer._attention import copy_to_buffer
from pyinfer.core.dtypes import BOOL, INT32, UINT8
from pyinfer.core.errors import check_dtype, check_ndim, fail
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, host_ints, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = ["packbits", "segment_packbits"]

_VECTOR_BYTES = 16
_MOST_BYTES = 2**31 - 1  # the new indptr is int32


def packbits(x: Any, bitorder: str = "big") -> Any:
    """Pack booleans into bytes, as numpy.packbits does.

    Parameters
    ----------
    x
        bool or uint8 [n], any stride; anything but 0 is true.
    bitorder
        "big": the first of eight becomes the highest bit; "little": the lowest.

    Returns
    -------
    uint8 [ceil(n / 8)], in x's framework and device. Missing bits of the last byte are 0.

    Raises
    ------
    TypeError, ValueError
        For another dtype, another rank, or no bit order.
    """
    op = "packbits"
    big = _is_big(op, bitorder)
    v = _booleans(op, x)
    count = v.shape[0]
    out = empty(v, (-(-count // 8),), UINT8)
    if not count:
        return out
    if v.device < 0:
        as_numpy(out)[:] = np.packbits(as_numpy(v), bitorder="big" if big else "little")
        return out
    _launch(v, view(out), big, False, 0, 0, 0)
    return out


def segment_packbits(x: Any, indptr: Any, bitorder: str = "big") -> tuple[Any, Any]:
    """Pack booleans into bytes, each segment from a whole byte on.

    Parameters
    ----------
    x
        bool or uint8 [n], any stride; anything but 0 is true.
    indptr
        int32 or int64 [batch + 1], non-decreasing, at most n: segment b is x[indptr[b]:indptr[b + 1]]. From a list, a NumPy array or a CPU tensor nothing
        synchronises; one on a GPU is copied to the host, which waits for it, because the number of bytes must be known.
    bitorder
        As in `packbits`.

    Returns
    -------
    packed
        uint8 [new_indptr[-1]], in x's framework and device.
    new_indptr
        int32 [batch + 1], on x's device: segment b's bytes begin at new_indptr[b].

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or rank, no bit order, an indptr that decreases or reaches beyond x.
    """
    op = "segment_packbits"
    big = _is_big(op, bitorder)
    v = _booleans(op, x)
    host = host_ints(indptr, op, "indptr", np.int64)
    if not len(host):
        fail(op, "indptr", "is empty", "0 entries", "batch + 1 entries")
    if host[0] < 0:
        fail(op, "indptr", "starts below 0", int(host[0]), "0 or more")
    lengths = host[1:] - host[:-1]
    if (lengths < 0).any():
        b = int((lengths < 0).argmax())
        fail(op, "indptr", "decreases", f"{host[b + 1]} at entry {b + 1} after {host[b]}", "a non-decreasing sequence")
    if host[-1] > v.shape[0]:
        fail(op, "indptr", "reaches beyond x", int(host[-1]), f"at most {v.shape[0]} (x has so many)")
    byte_indptr = np.zeros(len(host), np.int64)
    np.cumsum((lengths + 7) // 8, out=byte_indptr[1:])
    total = int(byte_indptr[-1])
    if total > _MOST_BYTES:
        fail(op, "indptr", "makes more bytes than an int32 counts", total, f"at most {_MOST_BYTES}", "Pack in parts.")
    out = empty(v, (total,), UINT8)
    if v.device < 0:
        from pyinfer.cpu.quantization import pack_segments

        new_indptr = empty(v, (len(host),), INT32)
        as_numpy(new_indptr)[:] = byte_indptr
        if total:
            pack_segments(as_numpy(v), host, byte_indptr, as_numpy(out), big)
        return out, new_indptr
    # Both index arrays go over in one copy: indptr as int64, then the new one as int32.
    both = np.concatenate([host.view(np.int32), byte_indptr.astype(np.int32)])
    on_device = empty(v, (len(both),), INT32)
    at = view(on_device)
    copy_to_buffer(at, both)
    if total:
        _launch(v, view(out), big, True, at.ptr, at.ptr + 8 * len(host), len(host) - 1)
    return out, on_device[2 * len(host) :]


def _is_big(op: str, bitorder: str) -> bool:
    if bitorder not in ("big", "little"):
        fail(op, "bitorder", "is no bit order", repr(bitorder), "'big' or 'little'")
    return bitorder == "big"


def _booleans(op: str, x: Any) -> TensorView:
    v = view(x, op, "x")
    check_dtype(op, "x", v, (BOOL, UINT8))
    check_ndim(op, "x", v, 1)
    return v


def _launch(
    x: TensorView, out: TensorView, big: bool, segments: bool, indptr: int, byte_indptr: int, batch: int
) -> None:
    from pyinfer.jit.quantization import BITS_PER_VECTOR_THREAD, BLOCK

    count, stride = x.shape[0], x.strides[0]
    vectors = not segments and (stride == 1 or count == 1) and x.ptr % _VECTOR_BYTES == 0
    work = -(-count // BITS_PER_VECTOR_THREAD) if vectors else out.shape[0]
    kernel, pdl = _kernel(x.device, big, segments, vectors)
    values = (x.ptr, out.ptr, indptr, byte_indptr, stride, count, out.shape[0], batch)
    kernel(current_stream(x), -(-work // BLOCK), values, pdl)


@functools.cache
def _kernel(device: int, big: bool, segments: bool, vectors: bool) -> tuple[Kernel, bool]:
    """Kernel, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.quantization import gen_packbits

    return gen_packbits(big, segments, vectors).build_and_load(device), pdl_supported(device)


attach(__name__)  # what torch.compile traces in the place of these functions
