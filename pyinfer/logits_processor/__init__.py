"""Pipelines from logits to tokens: temperature, softmax, top-k, top-p, min-p, sampling, in the order you write them, fused to the fewest kernels.

A processor of your own is a class with a method `legalize` that gives operators; an operator is a class with input and output types and a `__call__`.
"""

from pyinfer.logits_processor.compiler import Compiler, compile_pipeline
from pyinfer.logits_processor.fusion_rules import FusionRule
from pyinfer.logits_processor.op import Op, ParameterizedOp
from pyinfer.logits_processor.pipeline import LogitsPipe
from pyinfer.logits_processor.processors import (
    LegalizationError,
    LogitsProcessor,
    MinP,
    Sample,
    Softmax,
    Temperature,
    TopK,
    TopP,
    infer_initial_type,
    legalize_processors,
)
from pyinfer.logits_processor.types import TaggedTensor, TensorType
from pyinfer.logits_processor.validators import CompileError, ValidityCheck

__all__ = [
    "CompileError",
    "Compiler",
    "FusionRule",
    "LegalizationError",
    "LogitsPipe",
    "LogitsProcessor",
    "MinP",
    "Op",
    "ParameterizedOp",
    "Sample",
    "Softmax",
    "TaggedTensor",
    "Temperature",
    "TensorType",
    "TopK",
    "TopP",
    "ValidityCheck",
    "compile_pipeline",
    "infer_initial_type",
    "legalize_processors",
]
