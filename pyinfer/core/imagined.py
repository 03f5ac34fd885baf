"""Tensors that are not there: shape, dtype and device without memory.

`pyinfer.support` hands them to an operator, which checks them like any others. What it raises is the answer; where it would read memory or fetch a
kernel, everything that can be checked has been, and `Reached` ends the call. So there is one source of what is refused and in which words: the operator.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pyinfer.core import tensor
from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.tensor import TensorView

FRAMEWORK = "imagined"
_state = threading.local()


class Reached(BaseException):
    """The operator was about to use memory or a kernel: it refuses nothing. Not an `Exception`, so that no operator catches it."""


class Imagined:
    """A tensor without memory, contiguous unless `strides` (in elements) says otherwise. Only checks get to see one."""

    __slots__ = ("device", "dtype", "shape", "strides")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        device: int,
        op: str = "support",
        arg: str = "tensor",
        strides: Sequence[int] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        dense = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        self.strides = tuple(dense if strides is None else strides)
        self.dtype: DType = canonical_dtype(dtype, op, arg)
        self.device = device

    def __getitem__(self, index: Any) -> Imagined:
        """A range of the first axis; other indexing is a framework's own operation."""
        if not isinstance(index, slice):
            raise Reached
        rows = range(*index.indices(self.shape[0]))
        strides = (rows.step * self.strides[0], *self.strides[1:])
        return Imagined((len(rows), *self.shape[1:]), self.dtype, self.device, strides=strides)

    def __getattr__(self, name: str) -> Any:
        """A framework's own operation on the values: it comes after the checks."""
        raise Reached


def _view(x: Imagined, op: str, arg: str) -> TensorView:
    return TensorView(x, 0, x.shape, x.strides, x.dtype, x.device, FRAMEWORK)


tensor._viewers[Imagined] = _view


@contextlib.contextmanager
def imagining() -> Iterator[None]:
    """Calls of this thread use imagined tensors: `reached()` ends them instead of building a kernel."""
    before = getattr(_state, "active", False)
    _state.active = True
    try:
        yield
    finally:
        _state.active = before


def reached() -> None:
    """Raise `Reached` in a thread that is imagining: called in front of what needs a GPU or compiles."""
    if getattr(_state, "active", False):
        raise Reached
