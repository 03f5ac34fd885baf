"""Inputs and call forms shared by the sampling tests."""

from __future__ import annotations

import numpy as np

from pyinfer import sampling as S
from tests.reference import sampling as ref

DTYPES = ("float32", "bfloat16", "float16")


def spread_probs(rng: np.random.Generator, rows: int, vocab: int, scale: float = 3.0) -> np.ndarray:
    """Rows like a language model's: softmax of normal logits, sharper with `scale`."""
    return ref.softmax(rng.standard_normal((rows, vocab)) * scale).astype(np.float32)


def as_stored(backend, values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as float32 after rounding to `dtype`."""
    return backend.float64(backend.array(values, dtype)).astype(np.float32)


def ints(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(-(2**63), 2**63 - 1, n)


# Every filter in one form: (name, what it keeps of a row, the call).
FILTERS = {
    "all": (lambda p, k, q, m: ref.kept(p), lambda x, k, q, m, **kw: S.sampling_from_probs(x, **kw)),
    "top_k": (lambda p, k, q, m: ref.kept(p, k), lambda x, k, q, m, **kw: S.top_k_sampling_from_probs(x, k, **kw)),
    "top_p": (
        lambda p, k, q, m: ref.kept(p, None, q),
        lambda x, k, q, m, **kw: S.top_p_sampling_from_probs(x, q, **kw),
    ),
    "min_p": (
        lambda p, k, q, m: ref.kept(p, min_p=m),
        lambda x, k, q, m, **kw: S.min_p_sampling_from_probs(x, m, **kw),
    ),
    "top_k_first": (
        lambda p, k, q, m: ref.kept(p, k, q),
        lambda x, k, q, m, **kw: S.top_k_top_p_sampling_from_probs(x, k, q, **kw),
    ),
    "joint": (
        lambda p, k, q, m: ref.kept(p, k, q, joint=True),
        lambda x, k, q, m, **kw: S.top_k_top_p_sampling_from_probs(x, k, q, filter_apply_order="joint", **kw),
    ),
}


def hard_rows(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Rows that have broken samplers: ties, zeros, one token, flat, far from normalised, subnormal, nearly tied."""
    rows = [
        *spread_probs(rng, 3, vocab),
        np.full(vocab, 1 / vocab),
        rng.integers(0, 4, vocab) / 64,  # ties and zeros
        np.where(np.arange(vocab) == rng.integers(vocab), 1.0, 0.0),
        spread_probs(rng, 1, vocab, 40.0)[0],  # most underflow
        rng.random(vocab) * 1e4,  # not normalised: large ...
        rng.random(vocab) * 1e-6,  # ... and small
        1 / vocab * (1 + rng.integers(0, 3, vocab) * 2.0**-9),  # close together
        np.where(rng.random(vocab) < 0.5, -0.0, 1 / vocab),
    ]
    rows = np.array(rows)
    rows[:, 0] = np.where(rows.max(1) > 0, rows[:, 0], 1.0)
    return rows
