"""Checks operators and fuses them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyinfer.logits_processor.fusion_rules import FusionRule, get_default_fusion_rules
from pyinfer.logits_processor.op import Op
from pyinfer.logits_processor.types import TensorType
from pyinfer.logits_processor.validators import CompileError, ValidityCheck, get_default_validity_checks


class Compiler:
    """Fusion rules and validity checks; `compile` applies them."""

    def __init__(self) -> None:
        self.fusion_rules: list[FusionRule] = []
        self.validity_checks: list[ValidityCheck] = get_default_validity_checks()
        for rule in get_default_fusion_rules():
            self.register_fusion_rule(rule)

    def register_fusion_rule(self, rule: FusionRule) -> None:
        """Add a rule. Among equals in priority, the longer pattern is tried first, then the one registered first."""
        self.fusion_rules.append(rule)
        self.fusion_rules.sort(key=lambda r: (-r.prio, -len(r.pattern)))

    def register_validity_check(self, check: ValidityCheck) -> None:
        """Add a check."""
        self.validity_checks.append(check)

    def check(self, ops: Sequence[Op]) -> None:
        """CompileError unless types fit and every check passes."""
        if not ops:
            raise CompileError("operators: got none, wanted one or more.")
        if ops[0].IN is TensorType.INDICES:
            raise CompileError(
                f"{type(ops[0]).__name__} comes first: got token ids as its input, wanted LOGITS or PROBS."
            )
        for check in self.validity_checks:
            check(list(ops))
        for i, (before, op) in enumerate(zip(ops, ops[1:], strict=False), 1):
            if op.IN is not before.OUT:
                raise CompileError(
                    f"operator {i} ({type(op).__name__}) does not fit operator {i - 1} ({type(before).__name__}): got {before.OUT}, wanted {op.IN}."
                )

    def compile(self, ops: Sequence[Op]) -> list[Op]:
        """The operators, checked and fused.

        Raises
        ------
        CompileError
            If they make no pipeline, or a rule builds an operator of other types than those it replaces.
        """
        self.check(ops)
        fused, i = list(ops), 0
        while i < len(fused):
            rule = next((r for r in self.fusion_rules if self._applies(r, fused, i)), None)
            if rule is None:
                i += 1
                continue
            window = fused[i : i + len(rule.pattern)]
            made = rule.build(window)
            if made.IN is not window[0].IN or made.OUT is not window[-1].OUT:
                raise CompileError(
                    f"{type(made).__name__} stands for {' -> '.join(type(op).__name__ for op in window)}: got {made.IN} -> {made.OUT}, "
                    f"wanted {window[0].IN} -> {window[-1].OUT}."
                )
            if len(window) == 1 and type(made) is type(window[0]):
                raise CompileError(
                    f"{type(made).__name__} is built from itself: got a rule without end, wanted another operator."
                )
            fused[i : i + len(window)] = [made]
            i = 0  # what was built may be part of a longer pattern
        return fused

    @staticmethod
    def _applies(rule: FusionRule, ops: list[Op], i: int) -> bool:
        window = ops[i : i + len(rule.pattern)]
        fits = len(window) == len(rule.pattern) and all(map(isinstance, window, rule.pattern))
        return fits and bool(rule.guard(window))


def compile_pipeline(
    ops: Sequence[Op],
    custom_fusion_rules: Iterable[FusionRule] | None = None,
    custom_validity_checks: Iterable[ValidityCheck] | None = None,
) -> list[Op]:
    """Check and fuse operators, with rules and checks besides the package's own.

    Returns
    -------
    list of Op
        What runs.

    Raises
    ------
    CompileError
        As `Compiler.compile`, or from a check.
    """
    compiler = Compiler()
    for rule in custom_fusion_rules or ():
        compiler.register_fusion_rule(rule)
    for check in custom_validity_checks or ():
        compiler.register_validity_check(check)
    return compiler.compile(ops)
