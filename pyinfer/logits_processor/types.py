"""What flows through a pipeline: a tensor, what it means, and the distribution it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pyinfer.logits_processor.distribution import Distribution


class TensorType(Enum):
    """What a tensor means."""

    LOGITS = auto()
    """Scores, any real numbers or -inf."""
    PROBS = auto()
    """Probabilities, perhaps not normalised."""
    INDICES = auto()
    """Token ids: the end of a pipeline."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"TensorType.{self.name}"


@dataclass(frozen=True)
class TaggedTensor:
    """A tensor with its meaning.

    Attributes
    ----------
    data
        The tensor.
    type
        Its meaning.
    origin
        The distribution that `data` is a rounded form of, as the operators of this package leave it for those behind them: a pipeline whose operators run
        one by one then draws the very tokens that a fused one draws. None: `data` is all there is, as after an operator of your own.
    """

    data: Any
    type: TensorType
    origin: Distribution | None = None

    @staticmethod
    def logits(t: Any) -> TaggedTensor:
        """Scores."""
        return TaggedTensor(t, TensorType.LOGITS)

    @staticmethod
    def probs(t: Any) -> TaggedTensor:
        """Probabilities."""
        return TaggedTensor(t, TensorType.PROBS)

    @staticmethod
    def indices(t: Any) -> TaggedTensor:
        """Token ids."""
        return TaggedTensor(t, TensorType.INDICES)

    @property
    def shape(self) -> Any:
        """Shape of the tensor."""
        return self.data.shape

    @property
    def dtype(self) -> Any:
        """dtype of the tensor."""
        return self.data.dtype

    @property
    def device(self) -> Any:
        """Device of the tensor, as its framework has it."""
        return self.data.device

    def size(self, dim: int | None = None) -> Any:
        """Shape of the tensor, or one of its sizes."""
        return self.data.shape if dim is None else self.data.shape[dim]

    def __repr__(self) -> str:
        return f"TaggedTensor({self.type}, {tuple(self.data.shape)}, {self.data.dtype})"
