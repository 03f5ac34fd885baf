"""Large rows by one block each: what a guess leads to (candidates, candidates put aside, a search of the whole row) draws what the CPU draws."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import _sampling
from pyinfer import sampling as S
from tests.sampling_inputs import DTYPES, FILTERS, as_stored, ints

pytestmark = pytest.mark.gpu
VOCAB = 40_011


def row(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A float32 row of VOCAB probabilities."""
    noise = rng.standard_normal(VOCAB)
    rank = np.arange(VOCAB) if kind == "neighbours" else np.argsort(np.argsort(noise))
    spread = {"flat": 0.1, "flatter": 0.01, "peaked": 6.0, "one token": 60.0}.get(kind)
    x = -1.1 * np.log(rank + 2.7) + 0.3 * rng.standard_normal(VOCAB) if spread is None else spread * noise
    if kind == "first half":  # a part of the row says little about the rest
        x[: VOCAB // 2] -= 9.0
    p = np.exp(x - x.max())
    p /= p.sum()
    if kind == "ties":
        p = np.round(p * VOCAB * 8) / (VOCAB * 8)
    if kind == "zeros":
        p[rng.random(VOCAB) < 0.995] = 0
        p /= p.sum()
    if kind == "equal":
        p[:] = 1 / VOCAB
    if kind == "not normalised":
        p *= rng.choice([1e-9, 0.4, 7.3, 1e5])
    return p.astype(np.float32)


KINDS = (
    "flat", "flatter", "natural", "neighbours", "peaked", "one token", "first half", "ties", "zeros", "equal", "not normalised",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["probs", "logits"])
def test_one_block_draws_what_the_cpu_draws(backend_arrays, rng, monkeypatch, source, dtype):
    monkeypatch.setattr(_sampling, "_cluster_of", lambda *_: None)
    a = backend_arrays.array
    with np.errstate(divide="ignore"):
        x = np.stack([row(rng, kind) if source == "probs" else np.log(row(rng, kind)) for kind in KINDS for _ in "ab"])
    x = as_stored(backend_arrays, x.astype(np.float32), dtype)
    rows, begin = len(x), int(rng.integers(0, 9))
    gpu = a(np.pad(x, ((0, 0), (begin, 9 - begin))), dtype)[:, begin : begin + VOCAB]
    cpu = gpu.cpu()
    k = rng.choice([2, 40, 1000, 9000, VOCAB // 2, VOCAB], rows).astype(np.int32)
    q = rng.choice([0.0, 0.1, 0.5, 0.9, 0.99, 0.99999, 1.0], rows).astype(np.float32)
    m = rng.choice([0.0, 0.01, 0.3, 1.0], rows).astype(np.float32)
    seed = ints(rng, rows)
    if source == "probs":
        calls = {name: f for name, (_, f) in FILTERS.items()}
    else:
        calls = {
            order: lambda x, k, q, m, order=order, **kw: S.top_k_top_p_sampling_from_logits(
                x, k, q, filter_apply_order=order, **kw
            )
            for order in ("joint", "top_k_first")
        }
    for name, call in calls.items():
        got = call(gpu, a(k), a(q), a(m), seed=a(seed), return_valid=True)
        want = call(cpu, *(a(v).cpu() for v in (k, q, m)), seed=a(seed).cpu(), return_valid=True)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(backend_arrays.numpy(g), w.numpy(), f"{name} of {KINDS}, two each")


@pytest.mark.parametrize("dtype", DTYPES)
def test_renormalised_rows_are_those_of_the_cpu(backend_arrays, rng, dtype):
    a = backend_arrays.array
    x = a(np.stack([row(rng, kind) for kind in KINDS]), dtype)
    for call, argument in (
        (S.top_k_renorm_probs, rng.choice([1, 40, 9000, VOCAB], len(KINDS))),
        (S.top_p_renorm_probs, rng.choice([0.1, 0.5, 0.9, 0.99, 1.0], len(KINDS)).astype(np.float32)),
    ):
        got, want = call(x, a(argument)), call(x.cpu(), a(argument).cpu())
        np.testing.assert_array_equal(backend_arrays.numpy(got), want.numpy())
