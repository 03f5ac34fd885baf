"""Checks made before any launch, and the one form of their messages.

A message reads ``"{op}: {arg} {what}: got {got}, wanted {wanted}. {fix}"``: what is wrong, what came in, what is wanted and how to get there.
A wrong type or dtype is a TypeError, everything else a ValueError.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pyinfer.core.dtypes import DType
    from pyinfer.core.tensor import TensorView


def message(op: str, arg: str, what: str, got: object, wanted: object, fix: str = "") -> str:
    """The text of an error: what, got, wanted, fix."""
    text = f"{op}: {arg} {what}: got {got}, wanted {wanted}."
    return f"{text} {fix}" if fix else text


def fail(op: str, arg: str, what: str, got: object, wanted: object, fix: str = "") -> NoReturn:
    """Raise ValueError in the one form."""
    raise ValueError(message(op, arg, what, got, wanted, fix))


def fail_type(op: str, arg: str, what: str, got: object, wanted: object, fix: str = "") -> NoReturn:
    """Raise TypeError in the one form."""
    raise TypeError(message(op, arg, what, got, wanted, fix))


def check_dtype(op: str, arg: str, x: TensorView, allowed: Collection[DType]) -> None:
    """TypeError unless x.dtype is one of `allowed`."""
    dtype = x.dtype
    for candidate in allowed:
        if candidate is dtype:
            return
    names = " or ".join(d.name for d in allowed)
    fail_type(op, arg, "has the wrong dtype", dtype.name, names, f"Convert it to {names.split(' or ')[0]}.")


def check_same_dtype(op: str, arg: str, x: TensorView, other_arg: str, other: TensorView) -> None:
    """TypeError unless both have one dtype."""
    if x.dtype is not other.dtype:
        fail_type(op, arg, f"differs in dtype from {other_arg}", x.dtype.name, other.dtype.name, "Convert one of them.")


def check_ndim(op: str, arg: str, x: TensorView, ndim: int | tuple[int, ...]) -> None:
    """ValueError unless x has `ndim` axes (or one of them)."""
    n = len(x.shape)
    if n == ndim or (type(ndim) is tuple and n in ndim):
        return
    wanted = ndim if isinstance(ndim, int) else " or ".join(map(str, ndim))
    fail(op, arg, "has the wrong number of axes", f"{n} (shape {tuple(x.shape)})", wanted, "Reshape it.")


def check_shape(op: str, arg: str, x: TensorView, shape: tuple[int | None, ...]) -> None:
    """ValueError unless x.shape equals `shape`; None stands for any size."""
    got = x.shape
    if len(got) == len(shape):
        for have, want in zip(got, shape):  # noqa: B905 - lengths are equal; strict= costs a keyword call here
            if want is not None and have != want:
                break
        else:
            return
    wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
    fail(op, arg, "has the wrong shape", tuple(got), wanted)


def check_same_device(op: str, views: dict[str, TensorView]) -> None:
    """ValueError unless all views lie on one device."""
    first_arg, first = next(iter(views.items()))
    for arg, x in views.items():
        if x.device != first.device:
            fail(
                op,
                arg,
                "is on another device",
                device_name(x.device),
                f"{device_name(first.device)} (where {first_arg} is)",
                f"Move it, e.g. {arg}.to({device_name(first.device)!r}).",
            )


def check_last_dim_contiguous(op: str, arg: str, x: TensorView) -> None:
    """ValueError unless the last axis has stride 1. Axes of size 0 or 1 always pass."""
    if x.shape and x.shape[-1] > 1 and x.strides[-1] != 1 and 0 not in x.shape:
        fail(
            op,
            arg,
            "is not contiguous in its last axis",
            f"strides {tuple(x.strides)} for shape {tuple(x.shape)}",
            "last stride 1",
            "Call .contiguous() on it.",
        )


def device_name(device: int) -> str:
    """'cpu' or 'cuda:N'."""
    return "cpu" if device < 0 else f"cuda:{device}"
