"""Sampling: exact ids against integers of any size, statistics, determinism, generators, bad rows and bad arguments."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import sampling as S
from tests.arrays import assert_close, assert_same_bits
from tests.reference import sampling as ref

DTYPES = ("float32", "bfloat16", "float16")
SIGMAS = 5.0  # of the chi-square statistic: a false alarm in 3.5 million runs of a case


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


# ---- Philox ----------------------------------------------------------------------------------------------------------
def _words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


# The published vectors of Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    from pyinfer.cpu.philox import philox4x32_10

    assert [int(x) for x in philox4x32_10(*_words(counter), *_words(key))] == _words(result)
    assert ref.philox(tuple(_words(counter)), tuple(_words(key))) == _words(result)


@pytest.mark.cpu
def test_scale_bits_is_the_high_half_of_the_product(rng):
    from pyinfer.cpu.philox import scale_bits

    for _ in range(500):
        bits = int(rng.integers(0, 2**64, dtype=np.uint64))
        n = int(rng.integers(1, 2 ** int(rng.integers(1, 63)) + 1))
        assert scale_bits(np.uint64(bits), n) == (bits * n) >> 64
    assert scale_bits(np.uint64(2**64 - 1), 2**63 - 1) == ((2**64 - 1) * (2**63 - 1)) >> 64


# ---- exact ids -------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [1, 7, 251])
def test_ids_equal_exact_arithmetic(backend_arrays, rng, name, dtype, vocab):
    values = as_stored(backend_arrays, hard_rows(rng, vocab), dtype)
    values[:, 0] = np.where(
        (values > 0).any(1), values[:, 0], 1.0
    )  # rounding may have left a row without a positive value
    rows = len(values)
    k = rng.integers(1, vocab + 2, rows)
    q = rng.choice([0.0, 1e-30, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(np.float32)
    m = rng.choice([0.0, 0.01, 0.3, 1.0], rows).astype(np.float32)
    seed, offset = ints(rng, rows), ints(rng, rows)
    keeps, call = FILTERS[name]
    got, valid = call(
        backend_arrays.array(values, dtype),
        backend_arrays.array(k.astype(np.int32)),
        backend_arrays.array(q),
        backend_arrays.array(m),
        seed=backend_arrays.array(seed),
        offset=backend_arrays.array(offset),
        return_valid=True,
    )
    assert backend_arrays.numpy(got).dtype == np.int32
    assert backend_arrays.numpy(valid).all()
    greedy = k == 1 if "k" in name or name == "joint" else np.zeros(rows, bool)
    want = [
        int(values[r].argmax())
        if greedy[r]
        else ref.draw(values[r], keeps(values[r], int(k[r]), q[r], m[r]), ref.uniform64(int(seed[r]), int(offset[r])))
        for r in range(rows)
    ]
    np.testing.assert_array_equal(backend_arrays.numpy(got), want)


@pytest.mark.parametrize("name", ["all", "top_k_first", "joint", "min_p"])
@pytest.mark.parametrize("vocab", [4099, 8192 + 3])
def test_ids_equal_exact_arithmetic_large(backend_arrays, rng, name, vocab):
    """Rows of several rounds per thread; flat ones have more candidates than the GPU keeps in shared memory."""
    values = np.concatenate(
        [spread_probs(rng, 2, vocab, 2.0), spread_probs(rng, 1, vocab, 0.1), spread_probs(rng, 1, vocab, 8.0)]
    )
    rows = len(values)
    k = np.array([vocab // 2, 40, vocab - 5, 3])
    q = np.array([0.95, 0.8, 0.97, 0.9], np.float32)
    m = np.array([0.02, 0.001, 0.7, 0.1], np.float32)
    seed, offset = ints(rng, rows), ints(rng, rows)
    keeps, call = FILTERS[name]
    a = backend_arrays.array
    got = call(a(values), a(k), a(q), a(m), seed=a(seed), offset=a(offset))
    want = [
        ref.draw(values[r], keeps(values[r], int(k[r]), q[r], m[r]), ref.uniform64(int(seed[r]), int(offset[r])))
        for r in range(rows)
    ]
    np.testing.assert_array_equal(backend_arrays.numpy(got), want)


def test_integer_seed_tells_outputs_apart_by_place(backend_arrays, rng):
    values = spread_probs(rng, 1, 300, 0.2)
    x = backend_arrays.array(np.repeat(values, 16, 0))
    got = backend_arrays.numpy(S.sampling_from_probs(x, seed=-3, offset=11))
    want = [ref.draw(values[0], values[0] > 0, ref.uniform64(-3, 11, i)) for i in range(16)]
    np.testing.assert_array_equal(got, want)
    assert len(set(got.tolist())) > 4


# ---- statistics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILTERS)
def test_chi_square(backend_arrays, rng, name):
    vocab, draws = 60, 200_000
    p = spread_probs(rng, 1, vocab, 1.0)
    keeps, call = FILTERS[name]
    k, q, m = 17, 0.8, 0.1
    keep = keeps(p[0], k, q, m)
    assert keep.sum() > 1 and (name == "all" or keep.sum() < vocab)
    indices = backend_arrays.array(np.zeros(draws, np.int32))
    ids = backend_arrays.numpy(
        call(backend_arrays.array(p), k, q, m, indices=indices, seed=int(rng.integers(2**63)), offset=1)
    )
    observed = np.bincount(ids, minlength=vocab)
    assert observed.shape == (vocab,)
    assert not observed[~keep].any(), "a token was drawn that the filter drops"
    expected = ref.renorm(p[0], keep) * draws
    assert ref.chi_square_sigmas(observed[keep], expected[keep]) < SIGMAS


@pytest.mark.parametrize("consecutive", ["seed", "offset"])
def test_chi_square_from_logits_with_streams_of_their_own(backend_arrays, rng, consecutive):
    """One draw each from consecutive seeds, and from consecutive offsets: what a server asks for."""
    vocab, draws = 50, 100_000
    logits = rng.standard_normal((1, vocab)).astype(np.float32)
    numbers = backend_arrays.array(np.arange(draws))
    streams = {"seed": 5, "offset": 9, consecutive: numbers}
    indices = backend_arrays.array(np.zeros(draws, np.int64))
    ids = backend_arrays.numpy(S.sampling_from_logits(backend_arrays.array(logits), indices, **streams))
    expected = ref.softmax(logits)[0] * draws
    assert ref.chi_square_sigmas(np.bincount(ids, minlength=vocab), expected) < SIGMAS


def test_chi_square_notices_a_bias(rng):
    """The statistic itself: a 3 % shift of one cell among 60 does not pass."""
    p = spread_probs(rng, 1, 60, 1.0)[0].astype(np.float64)
    p /= p.sum()
    fair = rng.multinomial(200_000, p)
    assert ref.chi_square_sigmas(fair, p * 200_000) < SIGMAS
    biased = p.copy()
    top = biased.argmax()
    biased[top] *= 1.1
    unfair = rng.multinomial(200_000, biased / biased.sum())
    assert ref.chi_square_sigmas(unfair, p * 200_000) > SIGMAS


@pytest.mark.parametrize("scale", [12.0, 3.0, 0.05], ids=["peaked", "natural", "flat"])
def test_support(backend_arrays, rng, scale):
    """No draw leaves the kept set, and small kept sets are exhausted."""
    vocab, draws = 1501, 4000
    p = spread_probs(rng, 1, vocab, scale)
    p[0, rng.random(vocab) < 0.3] = 0
    indices = backend_arrays.array(np.zeros(draws, np.int32))
    for name, (keeps, call) in FILTERS.items():
        k, q, m = 20, 0.3, 0.6
        keep = keeps(p[0], k, q, m)
        ids = backend_arrays.numpy(
            call(backend_arrays.array(p), k, q, m, indices=indices, seed=int(rng.integers(2**62)))
        )
        assert keep[ids].all(), name
        likely = ref.renorm(p[0], keep) > 40 / draws  # missed by chance with probability e^-40
        assert set(np.flatnonzero(keep & likely)) <= set(ids.tolist()), name


# ---- determinism -----------------------------------------------------------------------------------------------------
def test_results_do_not_depend_on_the_batch(backend_arrays, rng):
    """Rows with streams of their own: the same ids in any order, in any part of the batch, through indices, and again."""
    rows, vocab = 12, 3001
    p = spread_probs(rng, rows, vocab)
    seed, offset = ints(rng, rows), rng.integers(0, 1000, rows)
    k, q = rng.integers(2, 200, rows).astype(np.int32), rng.random(rows).astype(np.float32)
    a = backend_arrays.array

    def call(which, **kw):
        return backend_arrays.numpy(
            S.top_k_top_p_sampling_from_probs(
                a(p[which]), a(k[which]), a(q[which]), seed=a(seed[which]), offset=a(offset[which]), **kw
            )
        )

    whole = call(np.arange(rows))
    assert_same_bits(call(np.arange(rows)), whole)
    order = rng.permutation(rows)
    assert_same_bits(call(order), whole[order])
    for part in (np.arange(1), np.arange(3, 8), np.array([rows - 1])):
        assert_same_bits(call(part), whole[part])
    picked = rng.integers(0, rows, 20)
    got = S.top_k_top_p_sampling_from_probs(
        a(p), a(k), a(q), a(picked.astype(np.int32)), seed=a(seed[picked]), offset=a(offset[picked])
    )
    assert_same_bits(backend_arrays.numpy(got), whole[picked])


@pytest.mark.cpu
def test_results_do_not_depend_on_threads(rng):
    from pyinfer.cpu import threads

    p = spread_probs(rng, 40, 5000)
    before = threads.get_num_threads()
    try:
        threads.set_num_threads(1)
        one = S.top_p_sampling_from_probs(p, 0.9, seed=1)
        threads.set_num_threads(4)
        assert_same_bits(S.top_p_sampling_from_probs(p, 0.9, seed=1), one)
    finally:
        threads.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits_equals_from_probs_of_softmax(backend_arrays, rng, dtype):
    rows, vocab = 24, 1777
    logits = backend_arrays.array(rng.standard_normal((rows, vocab)) * rng.choice([0.1, 2, 10], (rows, 1)), dtype)
    probs = S.softmax(logits)
    same = {"seed": int(rng.integers(2**62)), "offset": 3}

    def equal(x, y):
        np.testing.assert_array_equal(backend_arrays.numpy(x), backend_arrays.numpy(y))

    equal(S.sampling_from_logits(logits, **same), S.sampling_from_probs(probs, **same))
    for order in ("top_k_first", "joint"):
        for k, q in ((50, 0.9), (2, 0.3), (vocab, 0.7), (1700, 1.0)):
            equal(
                S.top_k_top_p_sampling_from_logits(logits, k, q, filter_apply_order=order, **same),
                S.top_k_top_p_sampling_from_probs(probs, k, q, filter_apply_order=order, **same),
            )
    equal(
        S.top_k_top_p_sampling_from_probs(probs, vocab, 0.6, filter_apply_order="joint", **same),
        S.top_p_sampling_from_probs(probs, 0.6, **same),
    )
    equal(S.top_k_top_p_sampling_from_probs(probs, 30, 1.0, **same), S.top_k_sampling_from_probs(probs, 30, **same))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_cpu(backend_arrays, rng, dtype):
    """Both backends give the same ids, and the same bits of softmax and renorm, from the same values."""
    from tests.arrays import NUMPY_DTYPES

    for vocab, scale in ((5, 2.0), (1023, 3.0), (32000, 2.0), (128257, 3.0), (262144, 0.3)):
        rows = 6
        host = (rng.standard_normal((rows, vocab)) * scale).astype(NUMPY_DTYPES.get(dtype, np.float32))
        there = backend_arrays.array(host)
        probs, probs_there = S.softmax(host, 0.7), S.softmax(there, 0.7)
        assert_same_bits(backend_arrays.numpy(probs_there), probs, f"softmax {vocab}")
        same = {"seed": int(rng.integers(2**62)), "offset": 7}
        pairs = [
            (S.sampling_from_logits, ()),
            (S.top_k_top_p_sampling_from_logits, (40, 0.9)),
            (S.top_k_top_p_sampling_from_logits, (vocab, 0.9)),
        ]
        for f, args in pairs:
            np.testing.assert_array_equal(backend_arrays.numpy(f(there, *args, **same)), f(host, *args, **same))
        probs = probs.astype(host.dtype)
        probs_there = backend_arrays.array(probs)
        calls = [
            (S.sampling_from_probs, ()),
            (S.top_k_sampling_from_probs, (40,)),
            (S.top_k_sampling_from_probs, (max(1, vocab // 2),)),
            (S.top_p_sampling_from_probs, (0.9,)),
            (S.min_p_sampling_from_probs, (0.05,)),
            (S.top_k_top_p_sampling_from_probs, (max(1, vocab // 3), 0.8)),
        ]
        for f, args in calls:
            np.testing.assert_array_equal(
                backend_arrays.numpy(f(probs_there, *args, **same)), f(probs, *args, **same), f.__name__
            )
        for f, arg in ((S.top_p_renorm_probs, 0.9), (S.top_k_renorm_probs, 33)):
            assert_same_bits(backend_arrays.numpy(f(probs_there, arg)), f(probs, arg), f.__name__)
        assert_same_bits(backend_arrays.numpy(S.top_k_mask_logits(there, 17)), S.top_k_mask_logits(host, 17))


# ---- greedy ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_one_is_argmax_with_the_lowest_id(backend, rng, dtype):
    rows, vocab = 9, 1031
    values = rng.integers(0, 12, (rows, vocab)) / 16  # many ties at the top
    values[0] = 0
    values[0, 77] = 0.25
    want = values.argmax(1)
    x = backend.array(values, dtype)
    for got in (
        S.top_k_sampling_from_probs(x, 1, seed=1),
        S.top_k_top_p_sampling_from_probs(x, 1, 0.5, seed=2),
        S.top_k_top_p_sampling_from_probs(
            x, backend.array(np.ones(rows, np.int32)), 1.0, filter_apply_order="joint", seed=3
        ),
        S.top_k_top_p_sampling_from_logits(backend.array(values * 30 - 3, dtype), 1, 0.9, seed=4),
    ):
        assert backend.is_own(got)
        np.testing.assert_array_equal(backend.numpy(got), want)


def test_greedy_from_logits_sees_differences_that_softmax_rounds_away(backend_arrays):
    small = np.float32(1e-9)
    x = np.array([[0, small, 2 * small, small]], np.float32)
    assert len(np.unique(backend_arrays.numpy(S.softmax(backend_arrays.array(x))))) == 1
    got = S.top_k_top_p_sampling_from_logits(backend_arrays.array(x), 1, 1.0, seed=0)
    assert backend_arrays.numpy(got).tolist() == [2]


# ---- generators ------------------------------------------------------------------------------------------------------
def test_torch_generator(device, backend_arrays, rng):
    import torch

    x = backend_arrays.array(spread_probs(rng, 6, 4000, 0.3))
    g = torch.Generator(device).manual_seed(41)
    first, second = (backend_arrays.numpy(S.top_p_sampling_from_probs(x, 0.95, generator=g)) for _ in range(2))
    assert (first != second).any(), "the generator was not advanced"
    state = torch.Generator(device).manual_seed(41)
    assert_same_bits(backend_arrays.numpy(S.top_p_sampling_from_probs(x, 0.95, generator=state)), first)
    saved = state.get_state()
    assert_same_bits(backend_arrays.numpy(S.top_p_sampling_from_probs(x, 0.95, generator=state)), second)
    state.set_state(saved)
    assert_same_bits(backend_arrays.numpy(S.top_p_sampling_from_probs(x, 0.95, generator=state)), second)
    on_cpu = [
        backend_arrays.numpy(S.sampling_from_probs(x, generator=torch.Generator().manual_seed(3))) for _ in range(2)
    ]
    assert_same_bits(*on_cpu)


def test_default_generator_obeys_manual_seed(backend_arrays, rng):
    import torch

    x = backend_arrays.array(spread_probs(rng, 8, 4000, 0.3))
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append([backend_arrays.numpy(S.sampling_from_probs(x)) for _ in range(2)])
    assert_same_bits(draws[0][0], draws[1][0])
    assert_same_bits(draws[0][1], draws[1][1])
    assert (draws[0][0] != draws[0][1]).any()


def test_numpy_generator(backend, rng):
    x = backend.array(spread_probs(rng, 6, 4000, 0.3))
    a, b = np.random.default_rng(5), np.random.default_rng(5)
    one, two = (backend.numpy(S.sampling_from_probs(x, generator=a)) for _ in range(2))
    assert_same_bits(backend.numpy(S.sampling_from_probs(x, generator=b)), one)
    assert_same_bits(backend.numpy(S.sampling_from_probs(x, generator=b)), two)
    assert (one != two).any()


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
    assert_same_bits(got, want)


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
    ]
    if arch == "90a":
        specs.append(J.gen_sample("bfloat16", "logits", "first"))
    for spec in specs:
        resources = spec.build(arch).resources
        assert resources.spill_stores == resources.spill_loads == resources.stack == 0, f"{spec}: {resources}"
        assert resources.registers <= 64, f"{spec}: {resources}"  # 1024 threads
        assert resources.smem <= 48 * 1024


@pytest.mark.compile
def test_specs_have_names_of_their_own():
    from pyinfer.jit import sampling as J

    names = [s.name for s in J.all_specs()]
    assert len(set(names)) == len(names) == len(J.gen_sampling_module().specs)
    with pytest.raises(ValueError, match="no such kernel"):
        J.gen_sample("float32", "probs", "top_a")
