"""Quantisation scales as callers give them: a number, or a float32 tensor where the data is."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyinfer.core.dtypes import FLOAT8_E4M3, FLOAT8_E5M2, FLOAT32, DType, canonical_dtype
from pyinfer.core.errors import check_dtype, check_last_dim_contiguous, check_shape, device_name, fail, fail_type
from pyinfer.core.tensor import TensorView, empty, view

FP8 = (FLOAT8_E4M3, FLOAT8_E5M2)


class Scale(NamedTuple):
    """A scale, or one a head: `tensor` (a float32 view of `size` elements), or None and `value`."""

    tensor: TensorView | None
    value: float
    size: int

    @property
    def ptr(self) -> int:
        """The tensor's address, 0 for a number."""
        return 0 if self.tensor is None else self.tensor.ptr

    def numpy(self) -> Any:
        """float32 [size], of a scale on the CPU."""
        import numpy as np

        from pyinfer.core.tensor import as_numpy

        if self.tensor is None:
            return np.full(1, self.value, np.float32)
        return as_numpy(self.tensor).reshape(-1)


def is_number(scale: Any) -> bool:
    """Whether a scale is a plain number (an int or float, not a tensor of one element)."""
    return isinstance(scale, float | int)


def given_scale(op: str, arg: str, scale: Any, like: TensorView, heads: int = 1) -> Scale:
    """Check a scale.

    Parameters
    ----------
    op, arg
        Names for the error message.
    scale
        A positive number, or a float32 tensor of one element (or of one a head, if `heads` is more) on the device of `like`.
    like
        What is to be quantised.
    heads
        How many elements a tensor may have besides one.

    Raises
    ------
    TypeError
        For a tensor that is not float32.
    ValueError
        For a number that is not positive and finite, or a tensor of another size or on another device.
    """
    if is_number(scale):
        value = float(scale)
        if not 0.0 < value < float("inf"):
            fail(op, arg, "is no scale", scale, "a positive, finite number")
        return Scale(None, value, 1)
    v = view(scale, op, arg)
    check_dtype(op, arg, v, (FLOAT32,))
    if v.size not in (1, heads) or sum(n != 1 for n in v.shape) > 1:
        wanted = "one element" if heads == 1 else f"one element, or one for each of {heads} heads"
        fail(op, arg, "has the wrong number of elements", f"{v.size} (shape {tuple(v.shape)})", wanted)
    if v.size > 1:
        check_last_dim_contiguous(op, arg, v)
    if v.device != like.device:
        got, wanted = device_name(v.device), f"{device_name(like.device)}, where the data is"
        fail(op, arg, "is on another device", got, wanted, "Move it once, outside the loop, or pass a number.")
    return Scale(v, 1.0, v.size)


def check_row_scales(op: str, scale: TensorView, shape: tuple[int, ...]) -> None:
    """Where each row's own scale is written: float32, dense, of that shape."""
    check_dtype(op, "scale", scale, (FLOAT32,))
    check_shape(op, "scale", scale, shape)
    if not scale.is_contiguous():
        fail(op, "scale", "is not contiguous", f"strides {tuple(scale.strides)}", "a dense tensor", "Leave it out.")


def empty_fp8(op: str, arg: str, like: TensorView, shape: tuple[int, ...], dtype: DType) -> Any:
    """`core.tensor.empty` for 8-bit floats, which not every framework has.

    Raises
    ------
    TypeError
        If that of `like`, the argument `arg`, has none.
    """
    if like.device >= 0 and like.framework not in ("torch", "imagined"):  # the latter: `pyinfer.support` asks for torch
        fix = "Use torch tensors."
        fail_type(op, arg, "comes from a framework without 8-bit floats", "a CuPy array", "a torch tensor", fix)
    return empty(like, shape, dtype)


def fp8_dtype(op: str, arg: str, dtype: Any, *outputs: TensorView | None) -> DType:
    """The 8-bit dtype to make: as asked for, else that of the first output given, else float8_e4m3fn.

    Raises
    ------
    TypeError
        If it is no 8-bit float.
    """
    if dtype is None:
        found = next((o.dtype for o in outputs if o is not None), FLOAT8_E4M3)
        if found not in FP8:
            fix = "Give an output of 8-bit floats."
            fail_type(op, arg, "cannot be that of the output given", found.name, " or ".join(x.name for x in FP8), fix)
        return found
    d = canonical_dtype(dtype, op, arg)
    if d not in FP8:
        fail_type(op, arg, "is no 8-bit float", d.name, " or ".join(x.name for x in FP8))
    return d
