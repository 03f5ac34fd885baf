"""Operators: what pipelines are made of, and what runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pyinfer.core.errors import fail
from pyinfer.logits_processor.types import TaggedTensor, TensorType


class Op(ABC):
    """A step from one type of tensor to another.

    Attributes
    ----------
    IN, OUT
        The types. A class must define both.
    reads
        Names of the runtime parameters it reads; None: unknown, so that the pipeline takes any.
    """

    IN: ClassVar[TensorType]
    OUT: ClassVar[TensorType]
    reads: tuple[str, ...] | None = None

    def __init__(self) -> None:
        for side in ("IN", "OUT"):
            if not isinstance(getattr(type(self), side, None), TensorType):
                fail(type(self).__name__, side, "is missing", getattr(type(self), side, None), "a TensorType")

    @abstractmethod
    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Run on a tensor of type IN, with the runtime parameters of the whole pipeline."""

    def _validate_input_type(self, tensor: TaggedTensor) -> TensorType:
        """ValueError unless the tensor is of type IN; returns OUT."""
        if tensor.type is not self.IN:
            fail(type(self).__name__, "tensor", "is of the wrong type", tensor.type, self.IN)
        return self.OUT

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.IN} -> {self.OUT})"


class ParameterizedOp(Op):
    """An operator with parameters: given when it is made, or when it runs, which counts."""

    def __init__(self, **default_params: Any) -> None:
        super().__init__()
        self.default_params = default_params

    def _get_param(self, name: str, kwargs: dict[str, Any], required: bool = True) -> Any:
        """A parameter; ValueError if it is required and not there."""
        value = kwargs.get(name)
        if value is None:
            value = self.default_params.get(name)
        if value is None and required:
            fail(type(self).__name__, name, "is missing", "None", f"a value: pipe(x, {name}=...)")
        return value
