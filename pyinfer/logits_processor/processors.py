"""Processors: what a user writes a pipeline with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pyinfer.logits_processor import operators
from pyinfer.logits_processor.op import Op
from pyinfer.logits_processor.types import TensorType


class LegalizationError(ValueError):
    """A processor that cannot stand where it does."""


class LogitsProcessor(ABC):
    """A step of a pipeline as the user names it. For one of your own, define `legalize`, which gives the operators to run.

    Parameters
    ----------
    **params
        Parameters known when the pipeline is made; those given when it runs count.

    Examples
    --------
    >>> class Bias(LogitsProcessor):
    ...     def legalize(self, input_type):
    ...         if input_type is not TensorType.LOGITS:
    ...             raise LegalizationError(f"Bias takes LOGITS, got {input_type}")
    ...         return [BiasOp(**self.params)]
    """

    def __init__(self, **params: Any) -> None:
        self.params = params

    @abstractmethod
    def legalize(self, input_type: TensorType) -> list[Op]:
        """Operators for an input of this type; `LegalizationError` if there are none."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.params.items())})"

    def _choose(self, input_type: TensorType, choices: dict[TensorType, type[Op]]) -> list[Op]:
        op: Any = choices.get(input_type)
        if op is None:
            raise LegalizationError(
                f"{type(self).__name__} cannot stand here: got {input_type}, wanted {' or '.join(map(str, choices))}."
            )
        return [op(**self.params)]


class Temperature(LogitsProcessor):
    """Logits divided by a temperature. Runtime parameter `temperature`: a number, or a float tensor [rows]; 0 counts as an infinite one."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        """LOGITS to LOGITS."""
        return self._choose(input_type, {TensorType.LOGITS: operators.TemperatureOp})


class Softmax(LogitsProcessor):
    """Logits to probabilities. Once in a pipeline.

    Parameters
    ----------
    enable_pdl
        As in `pyinfer.softmax`.
    """

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(enable_pdl=enable_pdl, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        """LOGITS to PROBS."""
        return self._choose(input_type, {TensorType.LOGITS: operators.SoftmaxOp})


class TopK(LogitsProcessor):
    """Keep the top_k most probable tokens, and ties with the last of them. Runtime parameter `top_k`: a number, or an integer tensor [rows].

    Of logits, the others become -inf; of probabilities 0, and the rest is renormalised.

    Parameters
    ----------
    joint_topk_topp
        With a TopP right behind: that looks at the probabilities as they come in here, not at what is kept, renormalised.
    """

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        """LOGITS to LOGITS, or PROBS to PROBS."""
        choices: dict[TensorType, type[Op]] = {
            TensorType.LOGITS: operators.LogitsTopKOp,
            TensorType.PROBS: operators.ProbsTopKOp,
        }
        return self._choose(input_type, choices)


class TopP(LogitsProcessor):
    """Keep the most probable tokens up to top_p of probability, and renormalise. Runtime parameter `top_p`: a number, or a float tensor [rows]."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        """PROBS to PROBS."""
        return self._choose(input_type, {TensorType.PROBS: operators.TopPOp})


class MinP(LogitsProcessor):
    """Keep tokens with at least min_p times the largest probability, and renormalise. Runtime parameter `min_p`: a number, or a float tensor [rows]."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        """PROBS to PROBS."""
        return self._choose(input_type, {TensorType.PROBS: operators.MinPOp})


class Sample(LogitsProcessor):
    """Draw a token. Runtime parameters, none of them required: `indices`, `generator`, `seed`, `offset`, `check_nan`, as in `pyinfer.sampling`.

    Parameters
    ----------
    deterministic
        Accepted for compatibility: results always are.
    """

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(deterministic=deterministic, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        """LOGITS or PROBS to INDICES."""
        choices: dict[TensorType, type[Op]] = {
            TensorType.LOGITS: operators.LogitsSampleOp,
            TensorType.PROBS: operators.ProbsSampleOp,
        }
        return self._choose(input_type, choices)


def infer_initial_type(processors: Sequence[LogitsProcessor]) -> TensorType:
    """The one type that the first processor takes; `LegalizationError` if it takes both or none."""
    fits = []
    for candidate in (TensorType.LOGITS, TensorType.PROBS):
        try:
            processors[0].legalize(candidate)
        except ValueError:
            continue
        fits.append(candidate)
    if len(fits) != 1:
        name = type(processors[0]).__name__
        if fits:
            raise LegalizationError(
                f"input_type is needed: got None, wanted TensorType.LOGITS or TensorType.PROBS, for {name} takes both."
            )
        raise LegalizationError(
            f"{name} comes first: got a processor that takes neither LOGITS nor PROBS, wanted one that does."
        )
    return fits[0]


def legalize_processors(processors: Sequence[LogitsProcessor], initial_type: TensorType) -> list[Op]:
    """The operators of processors in a row.

    Raises
    ------
    LegalizationError
        If a processor does not take what the one before it gives.
    """
    ops: list[Op] = []
    current = initial_type
    for i, processor in enumerate(processors):
        try:
            made = processor.legalize(current)
        except LegalizationError:
            raise
        except ValueError as error:
            raise LegalizationError(f"processor {i} ({type(processor).__name__}): {error}") from error
        if not made:
            raise LegalizationError(
                f"processor {i} ({type(processor).__name__}): got no operators, wanted one or more."
            )
        ops += made
        current = made[-1].OUT
    return ops
