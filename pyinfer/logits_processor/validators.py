"""What a pipeline must be, beyond types that fit."""

from __future__ import annotations

from collections.abc import Callable

from pyinfer.logits_processor.op import Op
from pyinfer.logits_processor.types import TensorType

ValidityCheck = Callable[[list[Op]], None]
"""Raises `CompileError` for operators that may not run together."""


class CompileError(ValueError):
    """Operators that make no pipeline."""


def nothing_after_ids(ops: list[Op]) -> None:
    """Token ids end a pipeline."""
    for i, op in enumerate(ops[:-1]):
        if op.OUT is TensorType.INDICES:
            raise CompileError(
                f"{type(op).__name__} gives token ids: got {len(ops) - 1 - i} operators behind it ({type(ops[i + 1]).__name__}, ...), wanted none."
            )


def one_softmax(ops: list[Op]) -> None:
    """Probabilities are made once."""
    count = sum(op.IN is TensorType.LOGITS and op.OUT is TensorType.PROBS for op in ops)
    if count > 1:
        raise CompileError(f"operators from logits to probabilities: got {count}, wanted one Softmax at most.")


def get_default_validity_checks() -> list[ValidityCheck]:
    """The checks that every pipeline passes."""
    return [nothing_after_ids, one_softmax]
