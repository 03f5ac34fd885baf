"""Which operators become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyinfer.logits_processor import operators as o
from pyinfer.logits_processor.op import Op


def _always(window: list[Op]) -> bool:
    return True


@dataclass(frozen=True)
class FusionRule:
    """Replace a run of operators by one.

    Attributes
    ----------
    pattern
        Classes of the operators in a row.
    guard
        Given these operators: whether to.
    build
        Given these operators: the one in their place.
    prio
        Rules of higher priority are tried first.
    """

    pattern: tuple[type[Op], ...]
    guard: Callable[[list[Op]], bool] = _always
    build: Callable[[list[Op]], Op] = None  # type: ignore[assignment]  # checked below
    prio: int = 0

    def __post_init__(self) -> None:
        if not self.pattern or not callable(self.build) or not callable(self.guard):
            raise ValueError(
                f"FusionRule: got pattern {self.pattern!r}, guard {self.guard!r}, build {self.build!r}, "
                "wanted one operator class or more and two functions."
            )


def get_default_fusion_rules() -> list[FusionRule]:
    """The rules of the operators in this package: wherever one kernel does the work of several."""
    filters: list[tuple[Any, ...]] = [(), (o.ProbsTopKOp,), (o.TopPOp,), (o.ProbsTopKOp, o.TopPOp)]
    rows: list[tuple[tuple[Any, ...], Any]] = [
        ((o.TemperatureOp, o.SoftmaxOp), o.FusedTemperatureSoftmaxOp),
        ((o.LogitsTopKOp, o.LogitsSampleOp), o.FusedLogitsTopKSampleOp),
        ((o.ProbsTopKOp, o.ProbsSampleOp), o.FusedProbsTopKSampleOp),
        ((o.TopPOp, o.ProbsSampleOp), o.FusedProbsTopPSampleOp),
        ((o.MinPOp, o.ProbsSampleOp), o.FusedProbsMinPSampleOp),
        ((o.ProbsTopKOp, o.TopPOp, o.ProbsSampleOp), o.FusedProbsTopKTopPSampleOp),
        *(((o.SoftmaxOp, *f, o.ProbsSampleOp), o.FusedSoftmaxSampleOp) for f in filters),
    ]
    # The longest pattern first; a temperature is taken by the softmax before that can be taken by a sampler.
    return [
        FusionRule(pattern, _always, build, 10 * len(pattern) + 100 * (pattern[0] is o.TemperatureOp))
        for pattern, build in rows
    ]
