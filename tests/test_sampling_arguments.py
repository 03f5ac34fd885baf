"""Bad rows, forms of arguments, bad arguments; and that the kernels compile."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import sampling as S
from tests.arrays import assert_same_bits
from tests.sampling_inputs import FILTERS, ints, spread_probs


# ---- rows that cannot be sampled -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILTERS)
def test_bad_rows_are_reported_not_sampled(backend_arrays, rng, name):
    p = spread_probs(rng, 8, 130)
    p[1, 100] = np.nan
    p[2] = 0
    p[3, 5] = -0.25
    p[4, 129] = np.inf
    p[5] = np.nan
    p[6, 3] = -np.nan
    x = backend_arrays.array(p)
    call = FILTERS[name][1]
    ids, valid = call(x, 10, 0.9, 0.1, seed=5, return_valid=True)
    np.testing.assert_array_equal(backend_arrays.numpy(valid), [True, *[False] * 6, True])
    ids = backend_arrays.numpy(ids)
    assert (ids[1:7] == 0).all() and (p[[0, 7], ids[[0, 7]]] > 0).all()
    assert_same_bits(backend_arrays.numpy(call(x, 10, 0.9, 0.1, seed=5)), ids)
    with pytest.raises(ValueError, match=r"probs cannot be sampled.*output 1, 2, 3, 4, 5, 6, wanted"):
        call(x, 10, 0.9, 0.1, seed=5, check_nan=True)
    good = backend_arrays.array(p[[0, 7]])
    assert backend_arrays.numpy(call(good, 10, 0.9, 0.1, check_nan=True)).shape == (2,)


def test_bad_logits_are_reported_not_sampled(backend_arrays, rng):
    x = rng.standard_normal((5, 67)).astype(np.float32)
    x[0, 3] = np.nan
    x[1] = -np.inf
    x[2, 1:] = -np.inf
    x[3, [5, 9]] = np.inf
    for f, args in ((S.sampling_from_logits, ()), (S.top_k_top_p_sampling_from_logits, (3, 0.99))):
        ids, valid = f(backend_arrays.array(x), *args, seed=1, return_valid=True)
        np.testing.assert_array_equal(backend_arrays.numpy(valid), [False, False, True, True, True])
        ids = backend_arrays.numpy(ids)
        assert ids[0] == ids[1] == ids[2] == 0 and ids[3] in (5, 9)
        with pytest.raises(ValueError, match=r"logits cannot be sampled.*output 0, 1, wanted"):
            f(backend_arrays.array(x), *args, check_nan=True)


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_thresholds_in_every_form(backend, rng):
    rows, vocab = 5, 600
    x = backend.array(spread_probs(rng, rows, vocab))
    for f, value, dtypes in (
        (S.top_k_sampling_from_probs, 7, ("int32", "int64")),
        (S.top_p_sampling_from_probs, 0.5, ("float32", "float64", "float16")),
        (S.min_p_sampling_from_probs, 0.25, ("float32", "bfloat16")),
    ):
        want = backend.numpy(f(x, value, seed=3))
        for dtype in dtypes:
            for shape in ((rows,), (rows, 1), (1,), ()):
                got = f(x, backend.array(np.full(shape, value), dtype), seed=3)
                np.testing.assert_array_equal(backend.numpy(got), want, f"{f.__name__} {dtype} {shape}")
        np.testing.assert_array_equal(
            backend.numpy(f(x, type(np.float32(0))(value) if isinstance(value, float) else np.int64(value), seed=3)),
            want,
        )


def test_thresholds_per_row_or_per_output(backend_arrays, rng):
    """With indices, a tensor's length says what it counts; where both fit, top_p and joint count rows, top_k and min_p outputs."""
    p = spread_probs(rng, 3, 500)
    a = backend_arrays.array
    x, indices = a(p), np.array([2, 0, 2, 1], np.int32)
    k = np.array([1, 5, 300], np.int32)
    seed = a(ints(rng, 4))
    by_row = S.top_k_sampling_from_probs(x, a(k), a(indices), seed=seed)
    by_output = S.top_k_sampling_from_probs(x, a(k[indices]), a(indices), seed=seed)
    assert_same_bits(backend_arrays.numpy(by_row), backend_arrays.numpy(by_output))
    swap = np.array([1, 2, 0], np.int32)
    seed = a(ints(rng, 3))
    got = S.top_k_sampling_from_probs(x, a(k), a(swap), seed=seed)
    want = S.top_k_sampling_from_probs(a(p[swap]), a(k), seed=seed)
    assert_same_bits(backend_arrays.numpy(got), backend_arrays.numpy(want))
    q = np.array([0.1, 0.6, 0.99], np.float32)
    got = S.top_p_sampling_from_probs(x, a(q), a(swap), seed=seed)
    want = S.top_p_sampling_from_probs(a(p[swap]), a(q[swap]), seed=seed)
    assert_same_bits(backend_arrays.numpy(got), backend_arrays.numpy(want))


BAD_CALLS = [
    (TypeError, "probs has the wrong dtype: got float64", lambda a, x: S.sampling_from_probs(a(np.ones((2, 8))))),
    (TypeError, "probs is no tensor: got builtins.list", lambda a, x: S.sampling_from_probs([[1.0]])),
    (ValueError, "probs has the wrong number of axes: got 1", lambda a, x: S.sampling_from_probs(x[0])),
    (ValueError, "unsupported vocabulary: got 0", lambda a, x: S.sampling_from_probs(x[:, :0])),
    (ValueError, "unsupported vocabulary: got 262145", lambda a, x: S.softmax(a(np.zeros((1, 262145)), "float32"))),
    (ValueError, "logits is not contiguous in its last axis", lambda a, x: S.sampling_from_logits(x[:, ::2])),
    (ValueError, "top_k is out of range: got 0, wanted 1 to", lambda a, x: S.top_k_sampling_from_probs(x, 0)),
    (TypeError, "top_k is no integer: got 2.5", lambda a, x: S.top_k_sampling_from_probs(x, 2.5)),
    (
        TypeError,
        "top_k has the wrong dtype: got float32",
        lambda a, x: S.top_k_renorm_probs(x, a(np.ones(4), "float32")),
    ),
    (TypeError, "top_k is neither a number nor a tensor: got str", lambda a, x: S.top_k_sampling_from_probs(x, "3")),
    (ValueError, "top_p is out of range: got 1.5, wanted 0 to 1", lambda a, x: S.top_p_sampling_from_probs(x, 1.5)),
    (ValueError, "top_p is out of range: got nan", lambda a, x: S.top_p_sampling_from_probs(x, float("nan"))),
    (ValueError, "min_p is out of range: got -0.1", lambda a, x: S.min_p_sampling_from_probs(x, -0.1)),
    (ValueError, "temperature is out of range: got -1.0", lambda a, x: S.softmax(x, -1.0)),
    (
        ValueError,
        r"top_p has the wrong length: got 3, wanted 4 \(rows\)",
        lambda a, x: S.top_p_sampling_from_probs(x, a(np.ones(3), "float32")),
    ),
    (
        ValueError,
        "top_k has the wrong number of axes",
        lambda a, x: S.top_k_renorm_probs(x, a(np.ones((2, 2), np.int32))),
    ),
    (
        TypeError,
        "indices has the wrong dtype: got float32",
        lambda a, x: S.sampling_from_probs(x, a(np.ones(2), "float32")),
    ),
    (
        ValueError,
        "filter_apply_order is unknown: got 'both'",
        lambda a, x: S.top_k_top_p_sampling_from_probs(x, 3, 0.5, None, "both"),
    ),
    (
        ValueError,
        "seed comes together with a generator",
        lambda a, x: S.sampling_from_probs(x, seed=1, generator=np.random.default_rng()),
    ),
    (ValueError, "offset comes without a seed", lambda a, x: S.sampling_from_probs(x, offset=1)),
    (
        ValueError,
        r"seed has the wrong length: got 3, wanted 4 \(outputs\)",
        lambda a, x: S.sampling_from_probs(x, seed=a(np.arange(3))),
    ),
    (
        TypeError,
        "seed has the wrong dtype: got float32",
        lambda a, x: S.sampling_from_probs(x, seed=a(np.ones(4), "float32")),
    ),
    (TypeError, "seed is neither an integer nor a tensor: got float", lambda a, x: S.sampling_from_probs(x, seed=1.0)),
    (
        TypeError,
        "generator is of an unknown kind: got builtins.int",
        lambda a, x: S.sampling_from_probs(x, generator=3),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS, ids=[m[:32] for _, m, _ in BAD_CALLS])
def test_bad_arguments(backend_arrays, error, message, call):
    x = backend_arrays.array(np.full((4, 8), 0.125), "float32")
    with pytest.raises(error, match=message):
        call(backend_arrays.array, x)


@pytest.mark.cpu
def test_host_values_are_checked(rng):
    p = spread_probs(rng, 3, 20)
    with pytest.raises(ValueError, match="top_k is out of range: got -4"):
        S.top_k_sampling_from_probs(p, np.array([1, -4, 2], np.int32))
    with pytest.raises(ValueError, match="indices names a row that is not there: got 0 to 3, wanted 0 to 2"):
        S.sampling_from_probs(p, np.array([0, 3], np.int32))


@pytest.mark.gpu
def test_device_values_are_harmless(backend_arrays, rng):
    """What is on the GPU stays there: rows out of range are reported, thresholds out of range count as the nearest sensible ones."""
    p = spread_probs(rng, 3, 700)
    a = backend_arrays.array
    ids, valid = S.sampling_from_probs(a(p), a(np.array([0, 3, -1, 2], np.int32)), seed=1, return_valid=True)
    assert backend_arrays.numpy(valid).tolist() == [True, False, False, True]
    assert backend_arrays.numpy(ids)[[1, 2]].tolist() == [0, 0]
    got = S.top_k_sampling_from_probs(a(p), a(np.array([0, -7, 1], np.int32)), seed=1)
    np.testing.assert_array_equal(backend_arrays.numpy(got), p.argmax(1))
    for top_p in (-1.0, 0.0):
        got = S.top_p_sampling_from_probs(a(p), a(np.full(3, top_p, np.float32)), seed=1)
        np.testing.assert_array_equal(backend_arrays.numpy(got), p.argmax(1))


@pytest.mark.gpu
def test_graph_replay_reads_new_offsets(backend_arrays, rng):
    """Seeds, offsets and thresholds on the GPU: a replayed CUDA graph sees their updates and gives the ids of a plain call."""
    import torch

    a = backend_arrays.array
    x, seed, offset = a(spread_probs(rng, 4, 3000)), a(ints(rng, 4)), a(np.zeros(4, np.int64))
    k, q = a(np.array([1, 20, 300, 3000], np.int32)), a(np.array([0.5, 0.9, 1.0, 0.8], np.float32))
    S.top_k_top_p_sampling_from_probs(x, k, q, seed=seed, offset=offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = S.top_k_top_p_sampling_from_probs(x, k, q, seed=seed, offset=offset)
    for step in range(3):
        offset.fill_(step)
        graph.replay()
        want = S.top_k_top_p_sampling_from_probs(x, k, q, seed=seed, offset=a(np.full(4, step)))
        assert_same_bits(backend_arrays.numpy(out), backend_arrays.numpy(want))


# ---- compilation -----------------------------------------------------------------------------------------------------
@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
def test_kernels_compile_without_spills(arch):
    """One of each template and filter, the largest among them (bfloat16: eight elements a vector)."""
    from pyinfer.jit import sampling as J

    specs = [
        J.gen_sample("bfloat16", "logits", "joint"),
        J.gen_sample("float32", "probs", "all"),
        J.gen_sample("float16", "probs", "min_p"),
        J.gen_softmax("bfloat16"),
        J.gen_renorm("float32"),
        J.gen_mask_logits("float32"),
        J.gen_chain("float16"),
    ]
    if arch == "90a":
        specs += [J.gen_sample("bfloat16", "logits", "first", paired) for paired in (True, False)]
    if arch in ("90a", "100a"):
        specs.append(J.gen_sample("float32", "probs", "joint", False))
    for spec in specs:
        resources = spec.build(arch).resources
        assert resources.spill_stores == resources.spill_loads == resources.stack == 0, f"{spec}: {resources}"
        blocks = 2 if arch in ("90a", "100a") and spec.block == J.PAIRED_BLOCK else 1  # on a multiprocessor
        assert resources.registers * spec.block[0] * blocks <= 65536, f"{spec}: {resources}"
        assert resources.smem <= 48 * 1024
        # KB of shared memory of a multiprocessor; a block's own 1 KB is the system's
        available = {"80": 164, "89": 100, "90a": 228, "100a": 228, "120a": 100}[arch]
        assert (resources.smem + spec.smem + 1024) * blocks <= available * 1024, f"{spec}: {resources}"


@pytest.mark.compile
def test_specs_have_names_of_their_own():
    from pyinfer.jit import sampling as J

    names = [s.name for s in J.all_specs()]
    assert len(set(names)) == len(names) == len(J.gen_sampling_module().specs)
    with pytest.raises(ValueError, match="no such kernel"):
        J.gen_sample("float32", "probs", "top_a")
