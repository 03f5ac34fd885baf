"""Distributions as the steps that make them, and how a token is drawn with the fewest kernels.

Every way to run a pipeline ends here: `draw` looks at the steps alone, so one by one or fused, equal steps and an equal generator give equal tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyinfer import sampling
from pyinfer.core.errors import fail_type
from pyinfer.core.tensor import view


class Filter(NamedTuple):
    """Keep tokens by "top_k", "top_p" or "min_p". `joint`: a top_k whose top_p looks at the probabilities in front of both."""

    name: str
    value: Any
    joint: bool = False


class Distribution(NamedTuple):
    """Logits or probabilities and what is done to them: temperature, softmax, filters in their order, the survivors renormalised after each.

    `softmax` holds the probabilities of the logits under the temperature, once somebody has made them.
    """

    source: Any
    logits: bool
    temperature: Any = None
    filters: tuple[Filter, ...] = ()
    softmax: Any = None

    def filtered(self, name: str, value: Any, joint: bool = False) -> Distribution:
        """With one more filter."""
        return self._replace(filters=(*self.filters, Filter(name, value, joint)))


def unfiltered(d: Distribution, enable_pdl: bool | None = None) -> Any:
    """The probabilities in front of all filters (as they came if they came as such)."""
    if not d.logits:
        return d.source
    return sampling.softmax(d.source, d.temperature, enable_pdl) if d.softmax is None else d.softmax


def probabilities(d: Distribution) -> Any:
    """The probabilities, [rows, vocab]: float32 unless nothing was done to them."""
    p = unfiltered(d)
    i = 0
    while i < len(d.filters):
        f = d.filters[i]
        behind = d.filters[i + 1] if i + 1 < len(d.filters) else None
        if f.joint and behind is not None and behind.name == "top_p":
            # Both look at p. Each alone keeps a set of the largest values; what passes both is the smaller one.
            k, q = sampling.top_k_renorm_probs(p, f.value), sampling.top_p_renorm_probs(p, behind.value)
            p = _renormalised(p, (k > 0) & (q > 0))
            i += 2
        else:
            p = _kept(p, f)
            i += 1
    return p


def _kept(p: Any, f: Filter) -> Any:
    if f.name == "top_k":
        return sampling.top_k_renorm_probs(p, f.value)
    if f.name == "top_p":
        return sampling.top_p_renorm_probs(p, f.value)
    values = float32(p)
    largest = row_max(values)
    return _renormalised(values, values >= column(f.value, values) * largest)


def draw(d: Distribution, indices: Any = None, **options: Any) -> Any:
    """Token ids. `options`: those of the samplers (generator, seed, offset, deterministic, check_nan)."""
    names = tuple(f.name for f in d.filters)
    last = d.filters[-2:] if names[-2:] == ("top_k", "top_p") else d.filters[-1:]
    if len(last) < len(names):  # more than a kernel does: all but the last ones first
        p = probabilities(d._replace(filters=d.filters[: len(names) - len(last)]))
        return draw(Distribution(p, False, None, last), indices, **options)
    value = {f.name: f.value for f in d.filters}
    order: Any = "joint" if names and d.filters[0].joint else "top_k_first"
    if d.logits and d.temperature is None and names != ("min_p",):
        if not names:
            return sampling.sampling_from_logits(d.source, indices, **options)
        top_k, top_p = value.get("top_k", d.source.shape[-1]), value.get("top_p", 1.0)
        return sampling.top_k_top_p_sampling_from_logits(d.source, top_k, top_p, indices, order, **options)
    p = unfiltered(d)
    if not names:
        return sampling.sampling_from_probs(p, indices, **options)
    if len(names) == 2:
        return sampling.top_k_top_p_sampling_from_probs(p, value["top_k"], value["top_p"], indices, order, **options)
    if names == ("top_p",):
        return sampling.top_p_sampling_from_probs(p, value["top_p"], indices, **options)
    # These two read a tensor as one value an output wherever that fits; in a pipeline it is one a row.
    if names == ("top_k",):
        return sampling.top_k_sampling_from_probs(p, _per_output(value["top_k"], indices, p), indices, **options)
    return sampling.min_p_sampling_from_probs(p, _per_output(value["min_p"], indices, p), indices, **options)


# ---- what there is no kernel for, in the tensor's own framework --------------------------------------------------------------------
def _framework(x: Any) -> Any:
    """torch, or the array module."""
    v = view(x, "LogitsPipe", "x")
    if v.framework == "torch":
        import torch

        return torch
    if v.framework == "cupy":
        import cupy

        return cupy
    if v.framework == "numpy":
        import numpy

        return numpy
    fail_type("LogitsPipe", "x", "is of another framework", type(x).__qualname__, "a torch, CuPy or NumPy array")


def float32(x: Any) -> Any:
    """x in float32."""
    m = _framework(x)
    return x.to(m.float32) if m.__name__ == "torch" else x.astype(m.float32)


def row_max(x: Any) -> Any:
    """[rows, 1]: the largest value of each row."""
    return x.amax(-1, keepdim=True) if _framework(x).__name__ == "torch" else x.max(-1, keepdims=True)


def column(value: Any, like: Any) -> Any:
    """A parameter in float32, as a number or [rows, 1]."""
    import numpy as np

    if not getattr(value, "shape", ()):
        return float(np.float32(float(value))) if _framework(like).__name__ == "torch" else np.float32(float(value))
    return float32(value).reshape(-1, 1)


def where(keep: Any, x: Any, other: float) -> Any:
    """x where `keep`, else a number."""
    m = _framework(x)
    return x.masked_fill(~keep, other) if m.__name__ == "torch" else m.where(keep, x, m.float32(other))


def _renormalised(p: Any, keep: Any) -> Any:
    p = where(keep, float32(p), 0.0)
    return p / p.sum(-1).reshape(-1, 1)


def _per_output(value: Any, indices: Any, source: Any) -> Any:
    """A parameter of one value a row, as the samplers take it: one an output."""
    shape = getattr(value, "shape", ())
    if indices is None or not shape or shape[0] != source.shape[0]:
        return value
    return value[indices.long()] if _framework(value).__name__ == "torch" else value[indices]
