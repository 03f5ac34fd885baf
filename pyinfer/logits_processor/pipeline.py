"""`LogitsPipe`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pyinfer.core.errors import fail
from pyinfer.logits_processor.compiler import Compiler, compile_pipeline
from pyinfer.logits_processor.fusion_rules import FusionRule
from pyinfer.logits_processor.op import Op
from pyinfer.logits_processor.processors import LogitsProcessor, infer_initial_type, legalize_processors
from pyinfer.logits_processor.types import TaggedTensor, TensorType
from pyinfer.logits_processor.validators import ValidityCheck


class LogitsPipe:
    """Processors in a row, from logits or probabilities to probabilities or token ids.

    Parameters
    ----------
    processors
        One or more, in their order.
    compile
        Fuse operators wherever one kernel does the work of several. Results do not depend on it: with equal seeds (or equal states of a generator) the
        tokens drawn are the same.
    input_type
        What the pipeline is given: TensorType.LOGITS or PROBS. Needed where the first processor takes both (TopK, Sample).
    custom_fusion_rules, custom_validity_checks
        Besides the package's own.

    Raises
    ------
    ValueError
        For processors that do not fit together.

    Examples
    --------
    >>> pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
    >>> pipe
    LogitsPipe([Temperature -> Softmax -> TopK -> TopP -> Sample], runs [FusedTemperatureSoftmaxOp -> FusedProbsTopKTopPSampleOp])
    >>> ids = pipe(logits, temperature=0.8, top_k=40, top_p=0.95, seed=seeds, offset=offsets)
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: Iterable[FusionRule] | None = None,
        custom_validity_checks: Iterable[ValidityCheck] | None = None,
    ) -> None:
        op = "LogitsPipe"
        self.processors = list(processors)
        if not self.processors:
            fail(op, "processors", "are missing", "an empty list", "one or more")
        for i, processor in enumerate(self.processors):
            if not isinstance(processor, LogitsProcessor):
                got = f"{getattr(processor, '__name__', type(processor).__name__)} at place {i}"
                fail(
                    op,
                    "processors",
                    "hold something else",
                    got,
                    "instances of LogitsProcessor",
                    "Write TopK(), not TopK.",
                )
        if input_type not in (None, TensorType.LOGITS, TensorType.PROBS):
            fail(op, "input_type", "is no input", input_type, "TensorType.LOGITS, TensorType.PROBS or None")
        self._initial_type = input_type or infer_initial_type(self.processors)
        self.ops = legalize_processors(self.processors, self._initial_type)
        self.compiled_ops: list[Op] | None = None
        if compile:
            self.compile(custom_fusion_rules, custom_validity_checks)
        else:
            checks = Compiler()
            for check in custom_validity_checks or ():
                checks.register_validity_check(check)
            checks.check(self.ops)

    @property
    def initial_type(self) -> TensorType:
        """What the pipeline is given: LOGITS or PROBS."""
        return self._initial_type

    def compile(
        self,
        custom_fusion_rules: Iterable[FusionRule] | None = None,
        custom_validity_checks: Iterable[ValidityCheck] | None = None,
    ) -> None:
        """Check and fuse. `CompileError` (a ValueError) if a check does not pass."""
        self.compiled_ops = compile_pipeline(self.ops, custom_fusion_rules, custom_validity_checks)

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        """Run.

        Parameters
        ----------
        x
            [rows, vocab], float32, bfloat16 or float16, of torch, CuPy or NumPy; or a `TaggedTensor` of the pipeline's input type.
        **kwargs
            The processors' runtime parameters. A name that none of them reads is refused.

        Returns
        -------
        tensor
            Float32 [rows, vocab], or int32 ids [outputs] behind a Sample.

        Raises
        ------
        ValueError
            If a parameter is missing or unknown, and for whatever an operator refuses, with the operator's place and name.
        """
        ops = self.ops if self.compiled_ops is None else self.compiled_ops
        self._check_names(kwargs)
        if isinstance(x, TaggedTensor):
            tensor = x
            if x.type is not self._initial_type:
                fail("LogitsPipe", "x", "is of the wrong type", x.type, self._initial_type)
        else:
            tensor = TaggedTensor(x, self._initial_type)
        for i, op in enumerate(ops):
            try:
                tensor = op(tensor, **kwargs)
            except (ValueError, TypeError) as error:
                raise ValueError(f"LogitsPipe: operator {i} ({type(op).__name__}): {error}") from error
        return tensor.data

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        known: set[str] = set()
        for op in self.ops:
            if op.reads is None:
                return
            known.update(op.reads)
        unknown = sorted(set(kwargs) - known)
        if unknown:
            wanted = ", ".join(sorted(known)) or "none"
            fail("LogitsPipe", unknown[0], "is read by no processor of this pipeline", "a value", f"only: {wanted}")

    def __repr__(self) -> str:
        def names(items: Sequence[Any]) -> str:
            return " -> ".join(type(item).__name__ for item in items)

        return f"LogitsPipe([{names(self.processors)}], runs [{names(self.compiled_ops or self.ops)}])"
