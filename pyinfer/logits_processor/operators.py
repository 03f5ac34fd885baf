"""The operators behind the processors, one by one and fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyinfer import sampling
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, fail
from pyinfer.core.tensor import view
from pyinfer.logits_processor.distribution import (
    Distribution,
    column,
    draw,
    float32,
    probabilities,
    unfiltered,
    where,
)
from pyinfer.logits_processor.op import Op, ParameterizedOp
from pyinfer.logits_processor.types import TaggedTensor, TensorType

_DRAW = ("generator", "seed", "offset", "check_nan")


def _origin(tensor: TaggedTensor) -> Distribution:
    if tensor.origin is not None:
        return tensor.origin
    return Distribution(tensor.data, tensor.type is TensorType.LOGITS)


def _check_temperature(temperature: Any) -> None:
    """ValueError for a negative temperature or a NaN on the host, as `pyinfer.softmax` has it."""
    shape = getattr(temperature, "shape", ())
    if not shape:
        lowest = float(temperature)
    elif shape[0] and view(temperature, "TemperatureOp", "temperature").device < 0:
        lowest = float(temperature.min())
    else:
        return
    if not lowest >= 0:
        fail("TemperatureOp", "temperature", "is negative or NaN", lowest, "0 or more")


class TemperatureOp(ParameterizedOp):
    """Logits divided by a temperature. 0 counts as an infinite one, as in `pyinfer.softmax`."""

    IN, OUT = TensorType.LOGITS, TensorType.LOGITS
    reads = ("temperature",)

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Scale."""
        self._validate_input_type(tensor)
        temperature = self._get_param("temperature", kwargs)
        _check_temperature(temperature)
        check_dtype(
            "TemperatureOp", "logits", view(tensor.data, "TemperatureOp", "logits"), (FLOAT32, BFLOAT16, FLOAT16)
        )
        x = float32(tensor.data)
        t = column(temperature, x)
        if not getattr(t, "shape", ()):
            scaled = x / t if t > 0 else where(x == -float("inf"), x, 0.0)
        else:
            scaled = where(t > 0, x, 0.0) / where(t > 0, t, 1.0)
            scaled = where(x != -float("inf"), scaled, -float("inf"))
        origin = _origin(tensor)
        plain = origin.temperature is None and not origin.filters
        return TaggedTensor(scaled, self.OUT, origin._replace(temperature=temperature) if plain else None)


class SoftmaxOp(ParameterizedOp):
    """Probabilities of logits."""

    IN, OUT = TensorType.LOGITS, TensorType.PROBS
    reads = ()

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Normalise."""
        self._validate_input_type(tensor)
        origin = _origin(tensor)
        if origin.filters:  # of the logits: what they leave is masked there
            origin = Distribution(tensor.data, True)
        made = unfiltered(origin, self.default_params.get("enable_pdl"))
        return TaggedTensor(made, self.OUT, origin._replace(softmax=made))


class LogitsTopKOp(ParameterizedOp):
    """All but the top_k largest logits become -inf; ties at the boundary stay."""

    IN, OUT = TensorType.LOGITS, TensorType.LOGITS
    reads = ("top_k",)

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Mask."""
        self._validate_input_type(tensor)
        top_k = self._get_param("top_k", kwargs)
        origin = _origin(tensor)
        plain = origin.temperature is None and not origin.filters
        masked = sampling.top_k_mask_logits(tensor.data, top_k)
        return TaggedTensor(masked, self.OUT, origin.filtered("top_k", top_k) if plain else None)


class _ProbsFilterOp(ParameterizedOp):
    IN, OUT = TensorType.PROBS, TensorType.PROBS
    name = ""

    def apply(self, origin: Distribution, kwargs: dict[str, Any]) -> Distribution:
        """The distribution behind this filter."""
        joint = bool(self.default_params.get("joint_topk_topp", False))
        return origin.filtered(self.name, self._get_param(self.name, kwargs), joint)

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Zero what is not kept and renormalise."""
        self._validate_input_type(tensor)
        origin = self.apply(_origin(tensor), kwargs)
        return TaggedTensor(probabilities(origin), self.OUT, origin)


class ProbsTopKOp(_ProbsFilterOp):
    """Keeps tokens with fewer than top_k more probable ones."""

    name, reads = "top_k", ("top_k",)


class TopPOp(_ProbsFilterOp):
    """Keeps tokens above which less than top_p of probability lies."""

    name, reads = "top_p", ("top_p",)


class MinPOp(_ProbsFilterOp):
    """Keeps tokens with at least min_p times the largest probability."""

    name, reads = "min_p", ("min_p",)


class _SampleOp(ParameterizedOp):
    OUT = TensorType.INDICES
    reads = ("indices", *_DRAW)

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Draw."""
        self._validate_input_type(tensor)
        return TaggedTensor.indices(self.draw(_origin(tensor), kwargs))

    def draw(self, origin: Distribution, kwargs: dict[str, Any]) -> Any:
        """Token ids of a distribution."""
        options = {name: kwargs[name] for name in _DRAW if kwargs.get(name) is not None}
        deterministic = bool(self.default_params.get("deterministic", True))
        return draw(origin, kwargs.get("indices"), deterministic=deterministic, **options)


class LogitsSampleOp(_SampleOp):
    """Draws from softmax of the logits."""

    IN = TensorType.LOGITS


class ProbsSampleOp(_SampleOp):
    """Draws from probabilities."""

    IN = TensorType.PROBS


class FusedOp(Op):
    """Operators that run as one. Subclasses say how."""

    def __init__(self, parts: Sequence[Op]) -> None:
        super().__init__()
        self.parts: Any = tuple(parts)
        names: list[str] = []
        for part in self.parts:
            names += part.reads or ()
        self.reads = tuple(names)


class FusedTemperatureSoftmaxOp(FusedOp):
    """Softmax of logits divided by a temperature: one kernel."""

    IN, OUT = TensorType.LOGITS, TensorType.PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Scale and normalise."""
        self._validate_input_type(tensor)
        origin = _origin(tensor)
        if origin.temperature is not None or origin.filters:
            origin = Distribution(tensor.data, True)
        origin = origin._replace(temperature=self.parts[0]._get_param("temperature", kwargs))
        made = unfiltered(origin, self.parts[1].default_params.get("enable_pdl"))
        return TaggedTensor(made, self.OUT, origin._replace(softmax=made))


class _FusedSampleOp(FusedOp):
    """Filters and the draw behind them: one kernel. Nothing in between is stored."""

    OUT = TensorType.INDICES

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Draw."""
        self._validate_input_type(tensor)
        *steps, sample = self.parts
        origin = _origin(tensor)
        for step in steps:
            if isinstance(step, SoftmaxOp):
                if origin.filters:
                    origin = Distribution(tensor.data, True)
            elif isinstance(step, LogitsTopKOp):
                if origin.temperature is not None or origin.filters:
                    origin = Distribution(tensor.data, True)
                origin = origin.filtered("top_k", step._get_param("top_k", kwargs))
            else:
                origin = step.apply(origin, kwargs)
        return TaggedTensor.indices(sample.draw(origin, kwargs))


class FusedProbsTopKSampleOp(_FusedSampleOp):
    """TopK, Sample."""

    IN = TensorType.PROBS


class FusedProbsTopPSampleOp(_FusedSampleOp):
    """TopP, Sample."""

    IN = TensorType.PROBS


class FusedProbsMinPSampleOp(_FusedSampleOp):
    """MinP, Sample."""

    IN = TensorType.PROBS


class FusedProbsTopKTopPSampleOp(_FusedSampleOp):
    """TopK, TopP, Sample; both orders of the filters."""

    IN = TensorType.PROBS


class FusedLogitsTopKSampleOp(_FusedSampleOp):
    """TopK of logits, Sample."""

    IN = TensorType.LOGITS


class FusedSoftmaxSampleOp(_FusedSampleOp):
    """Softmax, perhaps TopK, perhaps TopP, Sample: from logits to ids without storing probabilities."""

    IN = TensorType.LOGITS
