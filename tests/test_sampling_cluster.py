"""Samplers by clusters of blocks: the choice of a cluster on the host, and on a GPU the same ids as one block a row and as the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import _sampling
from pyinfer import sampling as S
from pyinfer.jit import sampling as J
from tests.sampling_inputs import DTYPES, FILTERS, as_stored, hard_rows, ints, spread_probs

MANY = [False, True]  # kernels


# ---- host ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_fits_wherever_it_begins(rng, itemsize):
    """What the kernel computes of the row's place, for the vocabulary that was promised to fit."""
    vec, warps = 16 // itemsize, J.CLUSTER * J.CLUSTER_BLOCK[0] // 32
    for vocab in (1, 31, 32_000, 128_256, 262_144, *rng.integers(1, _sampling.MAX_VOCAB, 50).tolist()):
        for begin in range(vec):
            vectors = -(-(begin + vocab) // vec)
            run = -(-vectors // warps)
            words = -(-run // 32) * vec // 4
            assert words * 128 <= J.cluster_keys_per_warp(vocab, itemsize)
            assert run * warps * vec >= begin + vocab, "every vector has its warp"


def test_choice_of_a_cluster(monkeypatch):
    from pyinfer.core import device

    arch = 90
    monkeypatch.setattr(device, "arch_number_of", lambda index: arch)
    monkeypatch.setattr(device, "num_sms", lambda index: 132)

    def forget():
        _sampling._cluster_of.cache_clear()

    def choice(vocab, outputs, itemsize=4):
        forget()
        return _sampling._cluster_of(0, vocab, itemsize, outputs)

    try:
        assert choice(128_256, 1) is choice(128_256, 16) is False  # 132 multiprocessors hold 16 clusters
        assert choice(128_256, 17) is choice(128_256, 512) is choice(32_000, 33) is None
        assert choice(163_837, 5) is False and choice(163_838, 5) is True
        assert choice(262_144, 1) is choice(262_144, 1, 2) is True
        assert choice(_sampling.CLUSTER_MIN_VOCAB - 1, 1) is None
        arch = 120
        assert choice(151_936, 1) is False and choice(262_144, 1) is None
        arch = 80
        assert choice(128_256, 1) is None
    finally:
        forget()


def test_factory_refuses_what_there_is_not():
    with pytest.raises(ValueError, match=r"gen_sample_cluster: no such kernel: got source='odds', wanted"):
        J.gen_sample_cluster("float32", "odds")


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["90a", "100a", "120a"])
def test_a_block_fits_on_a_multiprocessor(arch):
    for many in (False, True)[: 1 if arch == "120a" else 2]:
        for source in J.SOURCES:
            spec = J.gen_sample_cluster("bfloat16", source, many)
            resources = spec.build(arch).resources
            assert resources.spill_stores == resources.spill_loads == resources.stack == 0, resources
            assert resources.registers * 512 <= 65536
            assert resources.smem + spec.smem <= (99 if arch == "120a" else 227) * 1024


# ---- GPU -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def forced(monkeypatch):
    """forced(choice, call): run a call with a given cluster, or with None."""
    from pyinfer.core.device import arch_number_of

    def run(choice, call):
        if arch_number_of(0) < 90:
            pytest.skip("clusters need 9.0")
        monkeypatch.setattr(_sampling, "_cluster_of", lambda *args: choice)
        return call()

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", MANY)
@pytest.mark.parametrize("vocab", [1, 9, 131, 4099, 33_001])
def test_cluster_equals_one_block(backend_arrays, rng, forced, vocab, choice, dtype):
    from pyinfer.core.device import arch_number_of

    if choice and arch_number_of(0) >= 120:
        pytest.skip("too much shared memory for 12.0")
    values = as_stored(backend_arrays, hard_rows(rng, vocab), dtype)
    values = np.concatenate([values, np.zeros((3, vocab), np.float32)])
    values[-1, vocab // 2], values[-2, 0] = np.nan, -0.5
    rows = len(values)
    begin = int(rng.integers(0, 9))
    a = backend_arrays.array
    x = a(np.pad(values, ((0, 0), (begin, 11 - begin))), dtype)[:, begin : begin + vocab]
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.log(values)
    logits[0] = rng.standard_normal(vocab) * 4
    logits = a(np.pad(logits, ((0, 0), (begin, 11 - begin))), dtype)[:, begin : begin + vocab]
    k = rng.integers(1, vocab + 2, rows).astype(np.int32)
    k[::3] = min(40, vocab)
    q = rng.choice([0.0, 1e-30, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(np.float32)
    m = rng.choice([0.0, 0.01, 0.3, 1.0], rows).astype(np.float32)
    kw = {"seed": a(ints(rng, rows)), "offset": a(ints(rng, rows)), "return_valid": True}
    calls = {name: lambda f=f: f(x, a(k), a(q), a(m), **kw) for name, (_, f) in FILTERS.items()}
    calls["logits"] = lambda: S.sampling_from_logits(logits, **kw)
    for order in ("joint", "top_k_first"):
        calls[f"logits {order}"] = lambda order=order: S.top_k_top_p_sampling_from_logits(
            logits, a(k), a(q), filter_apply_order=order, **kw
        )
    for name, call in calls.items():
        want, got = ([backend_arrays.numpy(t) for t in forced(c, call)] for c in (None, choice))
        for w, g in zip(want, got, strict=True):
            np.testing.assert_array_equal(g, w, name)


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [1, 33, 500])
def test_cluster_repeats_itself(backend_arrays, rng, forced, outputs):
    """A race would show as a change from run to run; more outputs than clusters fit at a time."""
    x = backend_arrays.array(spread_probs(rng, outputs, 40_011, 2.0))

    def call():
        return backend_arrays.numpy(S.top_k_top_p_sampling_from_probs(x, 30_000, 0.9, seed=5))

    want = forced(None, call)
    for choice in MANY:
        for _ in range(5):
            np.testing.assert_array_equal(forced(choice, call), want)
