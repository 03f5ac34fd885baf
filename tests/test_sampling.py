"""Drawing tokens: exact ids against integers of any size, statistics, determinism, greedy, generators."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import sampling as S
from tests.arrays import assert_same_bits
from tests.reference import sampling as ref
from tests.sampling_inputs import DTYPES, FILTERS, as_stored, hard_rows, ints, spread_probs

SIGMAS = 5.0  # of the chi-square statistic: a false alarm in 3.5 million runs of a case


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
