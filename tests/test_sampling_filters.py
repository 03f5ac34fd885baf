"""softmax, renormalisation and masks as tensors; strides, alignment and sizes of all the family's inputs."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import sampling as S
from tests.arrays import assert_close, assert_same_bits
from tests.reference import sampling as ref
from tests.sampling_inputs import DTYPES, as_stored, hard_rows, spread_probs


# ---- softmax, renorm, mask -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 3, 1000, 4097, 33001])
def test_softmax(backend, rng, dtype, vocab):
    x = rng.standard_normal((5, vocab)) * rng.choice([0.1, 3, 30], (5, 1))
    x[1, rng.random(vocab) < 0.5] = -np.inf
    x[1, 0] = 0
    stored = as_stored(backend, x, dtype)
    temperature = np.array([1, 0.3, 2, 0.0, 1e-4], np.float32)
    got = S.softmax(backend.array(x, dtype), backend.array(temperature))
    assert backend.is_own(got)
    assert backend.numpy(got).dtype == np.float32
    # The exponent is rounded once in float32: up to 2^-24 of 200 or so before it underflows.
    assert_close(backend.float64(got), ref.softmax(stored, temperature), rtol=2e-5, name="softmax")
    assert_close(backend.float64(got).sum(1), np.ones(5), rtol=1e-6)
    assert (backend.numpy(got)[1][~np.isfinite(stored[1])] == 0).all()
    for scalar in (None, 0.5, 0.0):
        got = S.softmax(backend.array(x, dtype), scalar)
        assert_close(backend.float64(got), ref.softmax(stored, 1.0 if scalar is None else scalar), rtol=2e-5)


def test_softmax_of_odd_rows(backend_arrays, rng):
    x = rng.standard_normal((4, 50)).astype(np.float32)
    x[0] = -np.inf
    x[1, 7] = np.nan
    x[2, [3, 4]] = np.inf
    x[3] = 3e38
    x[3, ::2] = -3e38
    for temperature in (None, 0.5):
        got = backend_arrays.float64(S.softmax(backend_arrays.array(x), temperature))
        assert_close(got, ref.softmax(x), rtol=1e-6)


def test_row_strides_and_alignment(backend_arrays, rng):
    """Rows that begin anywhere: column slices, every second row, a broadcast row."""
    base = spread_probs(rng, 6, 1100)
    seed = int(rng.integers(2**62))
    for dtype in DTYPES:
        whole = backend_arrays.array(base, dtype)
        for begin, end in ((1, 1100), (3, 1003), (5, 12), (8, 1098)):
            part = whole[::2, begin:end]
            dense = backend_arrays.array(as_stored(backend_arrays, base, dtype)[::2, begin:end], dtype)
            for f, args in (
                (S.sampling_from_probs, ()),
                (S.top_k_top_p_sampling_from_probs, (9, 0.7)),
                (S.top_p_sampling_from_probs, (0.7,)),
                (S.sampling_from_logits, ()),
            ):
                got, want = (backend_arrays.numpy(f(t, *args, seed=seed)) for t in (part, dense))
                np.testing.assert_array_equal(got, want, f"{f.__name__} {dtype} [{begin}:{end}]")
            for f, args in (
                (S.softmax, ()),
                (S.top_p_renorm_probs, (0.8,)),
                (S.top_k_renorm_probs, (5,)),
                (S.top_k_mask_logits, (5,)),
            ):
                got, want = (backend_arrays.numpy(f(t, *args)) for t in (part, dense))
                assert_same_bits(got, want, f"{f.__name__} {dtype} [{begin}:{end}]")
    broadcast = backend_arrays.array(base[:1]).expand(4, 1100)
    same = backend_arrays.array(np.repeat(base[:1], 4, 0))
    assert_same_bits(*(backend_arrays.numpy(S.sampling_from_probs(t, seed=seed)) for t in (broadcast, same)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 9, 2000])
def test_renorm(backend, rng, dtype, vocab):
    values = as_stored(backend, hard_rows(rng, vocab), dtype)
    values[:, 0] = np.where((values > 0).any(1), values[:, 0], 1.0)
    rows = len(values)
    k = rng.integers(1, vocab + 2, rows)
    q = rng.choice([0.0, 0.2, 0.9, 1.0], rows).astype(np.float32)
    by_k = S.top_k_renorm_probs(backend.array(values, dtype), backend.array(k))
    by_p = S.top_p_renorm_probs(backend.array(values, dtype), backend.array(q))
    assert backend.is_own(by_k) and backend.numpy(by_k).dtype == np.float32
    for got, keeps in (
        (by_k, [ref.kept(v, int(a)) for v, a in zip(values, k, strict=True)]),
        (by_p, [ref.kept(v, None, b) for v, b in zip(values, q, strict=True)]),
    ):
        want = np.array([ref.renorm(v, keep) for v, keep in zip(values, keeps, strict=True)])
        got = backend.float64(got)
        np.testing.assert_array_equal(got > 0, want > 0)
        assert_close(got, want, rtol=3e-7)
    assert S.top_k_renorm_prob is S.top_k_renorm_probs and S.top_p_renorm_prob is S.top_p_renorm_probs
    trouble = np.zeros((2, vocab), np.float32)
    trouble[1, -1] = np.nan
    got = backend.numpy(S.top_p_renorm_probs(backend.array(trouble, dtype), 0.5))
    assert (got[0] == 0).all() and np.isnan(got[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_mask_logits(backend, rng, dtype):
    rows, vocab = 7, 1203
    x = rng.standard_normal((rows, vocab)) * 4
    x[1] = np.round(x[1])  # ties
    x[2, 5] = np.inf
    x[3, 4:] = -np.inf
    x[4, :3] = [0.0, -0.0, np.nan]
    x[5] = -np.abs(x[5])
    x[6] = np.nan
    k = np.array([1, 30, 3, 6, vocab // 2, vocab, 4])
    stored = as_stored(backend, x, dtype)
    got = backend.numpy(S.top_k_mask_logits(backend.array(x, dtype), backend.array(k)))
    assert got.dtype == np.float32
    want = stored.copy()
    for r in range(rows):
        values = np.sort(stored[r][~np.isnan(stored[r])])[::-1]
        if len(values) > 0 and k[r] < len(values):
            want[r][stored[r] < values[k[r] - 1]] = -np.inf
    # A NaN's payload is the conversion's own affair: a GPU gives the canonical NaN for any float16 one.
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert_same_bits(np.where(np.isnan(got), 0, got), np.where(np.isnan(want), 0, want))


@pytest.mark.parametrize("enable_pdl", [None, True, False])
def test_pdl_chain(backend_arrays, rng, enable_pdl):
    """Kernels that depend on each other, back to back: every one must wait for the one before it."""
    logits = backend_arrays.array(rng.standard_normal((3, 20_011)) * 3, "float32")
    want = None
    for _ in range(8):
        masked = S.top_k_mask_logits(logits, 500)
        probs = S.softmax(masked, 0.8, enable_pdl=enable_pdl)
        renormed = S.top_p_renorm_probs(probs, 0.9)
        ids = backend_arrays.numpy(S.sampling_from_probs(renormed, seed=5))
        if want is None:
            values = ref.softmax(backend_arrays.float64(masked), 0.8)
            assert_close(backend_arrays.float64(probs), values, rtol=2e-5)
            want = ids
        assert_same_bits(ids, want)
    assert (backend_arrays.numpy(renormed)[np.arange(3), want] > 0).all()


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [128_257, 262_144])
def test_large_vocabularies(backend_arrays, rng, vocab):
    p = np.zeros((2, vocab), np.float32)
    p[0, [0, vocab // 2, vocab - 1]] = [0.25, 0.5, 0.25]
    p[1] = 1 / vocab
    x = backend_arrays.array(p, "bfloat16")
    draws = 40
    indices = backend_arrays.array(np.repeat(np.arange(2), draws))
    for f, args in (
        (S.sampling_from_probs, ()),
        (S.top_k_top_p_sampling_from_probs, (3, 0.9)),
        (S.top_p_sampling_from_probs, (0.95,)),
        (S.min_p_sampling_from_probs, (0.1,)),
    ):
        ids = backend_arrays.numpy(f(x, *args, indices=indices, seed=int(rng.integers(2**62))))
        assert set(ids[:draws]) == {0, vocab // 2, vocab - 1}
        assert (ids >= 0).all() and (ids < vocab).all()
        assert ids[draws:].max() > vocab // 2 and len(set(ids[draws:])) > draws // 2
    renormed = backend_arrays.float64(S.top_k_renorm_probs(x, 3))
    assert np.flatnonzero(renormed[0]).tolist() == [0, vocab // 2, vocab - 1] and np.allclose(
        renormed.sum(1), 1, atol=1e-5
    )


def test_no_rows(backend):
    x = backend.array(np.zeros((0, 40)), "float32")
    for f, args in ((S.sampling_from_probs, ()), (S.top_k_sampling_from_probs, (3,)), (S.sampling_from_logits, ())):
        got = f(x, *args, check_nan=True)
        assert backend.is_own(got) and backend.numpy(got).shape == (0,) and backend.numpy(got).dtype == np.int32
    assert backend.numpy(S.softmax(x)).shape == (0, 40)
    rows = backend.array(np.ones((3, 40)), "float32")
    none = S.sampling_from_probs(rows, backend.array(np.zeros(0, np.int32)), seed=1)
    assert backend.numpy(none).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_boundaries_on_exact_probabilities(backend, dtype):
    """The sums here are exact, so `<` and `<=` differ; the two tokens of 1/8 stand or fall together."""
    x = backend.array([[0.5, 0.125, 0.25, 0.125]], dtype)

    def support(y):
        return np.flatnonzero(backend.float64(y)[0]).tolist()

    for top_p, want in (
        (0.0, [0]),
        (0.5, [0]),
        (0.5001, [0, 2]),
        (0.75, [0, 2]),
        (0.7501, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert support(S.top_p_renorm_probs(x, top_p)) == want, top_p
    for top_k, want in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        assert support(S.top_k_renorm_probs(x, top_k)) == want, top_k
    rows = backend.array(np.zeros(200, np.int32))

    def drawn(top_k, top_p, order):
        ids = S.top_k_top_p_sampling_from_probs(x, top_k, top_p, rows, filter_apply_order=order, seed=12)
        return sorted(set(backend.numpy(ids).tolist()))

    # Of {0, 2} renormalised, token 0 holds two thirds; of all, a half.
    assert drawn(2, 0.625, "top_k_first") == [0]
    assert drawn(2, 0.625, "joint") == [0, 2]
    assert drawn(2, 0.75, "top_k_first") == [0, 2]
    assert drawn(4, 0.5, "joint") == [0]
