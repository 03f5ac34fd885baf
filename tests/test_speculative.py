"""chain_speculative_sampling: exact ids, the distribution it promises, odd rows, arguments."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.reference import sampling as ref
from tests.reference import speculative
from tests.sampling_inputs import DTYPES, as_stored, ints, spread_probs

SIGMAS = 5.0


def problem(rng, requests, n, vocab, closeness=0.7):
    """Draft and target rows that agree in part, drafts drawn from the draft rows."""
    draft = spread_probs(rng, requests * n, vocab, 2.0).reshape(requests, n, vocab)
    other = spread_probs(rng, requests * (n + 1), vocab, 2.0).reshape(requests, n + 1, vocab)
    target = other.copy()
    target[:, :n] = closeness * draft + (1 - closeness) * other[:, :n]
    ids = np.array([[rng.choice(vocab, p=p / p.sum()) for p in row.astype(np.float64)] for row in draft], np.int64)
    return draft, ids.reshape(requests, n), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "vocab"), [(0, 5), (1, 1), (3, 40), (5, 1300)])
def test_equals_exact_arithmetic(backend_arrays, rng, dtype, n, vocab):
    requests = 7
    draft, ids, target = problem(rng, requests, n, vocab)
    a = backend_arrays.array
    seed, offset = ints(rng, requests), ints(rng, requests)
    stored = [
        as_stored(backend_arrays, x.reshape(-1, vocab), dtype).reshape(x.shape) if x.size else x
        for x in (draft, target)
    ]
    want = [
        speculative.chain(stored[0][b], ids[b], stored[1][b], int(seed[b]), int(offset[b])) for b in range(requests)
    ]
    got = pyinfer.chain_speculative_sampling(
        a(draft, dtype), a(ids.astype(np.int32)), a(target, dtype), seed=a(seed), offset=a(offset), return_valid=True
    )
    got, accepted, emitted, valid = (backend_arrays.numpy(x) for x in got)
    assert got.dtype == accepted.dtype == emitted.dtype == np.int32 and valid.all()
    np.testing.assert_array_equal(got, [w[0] for w in want])
    np.testing.assert_array_equal(accepted, [w[1] for w in want])
    np.testing.assert_array_equal(emitted, [w[2] for w in want])


def test_integer_seed_and_counters(backend_arrays, rng):
    requests, n, vocab = 9, 4, 33
    draft, ids, target = problem(rng, requests, n, vocab)
    a = backend_arrays.array
    counters = [a(np.arange(requests, dtype=np.int32)), a(np.full(requests, 100, np.int32))]
    got, accepted, emitted = pyinfer.chain_speculative_sampling(
        a(draft), a(ids), a(target), *counters, seed=-9, offset=4
    )
    assert accepted is counters[0] and emitted is counters[1]
    want = [speculative.chain(draft[b], ids[b], target[b], -9, 4, b * (n + 1)) for b in range(requests)]
    np.testing.assert_array_equal(backend_arrays.numpy(got), [w[0] for w in want])
    np.testing.assert_array_equal(backend_arrays.numpy(accepted), [b + w[1] for b, w in enumerate(want)])
    np.testing.assert_array_equal(backend_arrays.numpy(emitted), [100 + w[2] for w in want])
    assert len({w[2] for w in want}) > 1, "the drafts should differ in how far they get"


def test_distribution_is_the_targets(backend_arrays, rng):
    """Drafts drawn from the draft rows: the first token is distributed as target[0], and the second, where the first was accepted, as target[1]."""
    requests, n, vocab = 60_000, 2, 12
    draft, _, target = problem(rng, 1, n, vocab, 0.5)
    ids = np.stack([rng.choice(vocab, requests, p=p / p.sum()) for p in draft[0].astype(np.float64)], 1)
    a = backend_arrays.array
    wide = [a(x).expand(requests, *x.shape[1:]) for x in (draft, target)]
    got, _, emitted = pyinfer.chain_speculative_sampling(
        wide[0], a(ids), wide[1], seed=int(rng.integers(2**62)), offset=3
    )
    got, emitted = backend_arrays.numpy(got), backend_arrays.numpy(emitted)
    for position, which in enumerate((emitted >= 0, emitted >= 1, emitted >= 2)):
        expected = target[0, position].astype(np.float64)
        expected *= which.sum() / expected.sum()
        observed = np.bincount(got[which, position], minlength=vocab)
        assert ref.chi_square_sigmas(observed, expected) < SIGMAS, position
    rate = np.minimum(draft[0, 0], target[0, 0]).sum()  # the acceptance rate of the paper's theorem
    assert abs((emitted >= 1).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / requests)


def test_odd_rows(backend_arrays, rng):
    requests, n, vocab = 8, 2, 50
    draft, ids, target = problem(rng, requests, n, vocab)
    ids[:, 0] = 3
    draft[:, 0, 3] = 0.5
    target[0, 0, 3] = 0  # never accepted, drawn from the difference
    ids[1, 0], ids[2, 0] = -1, vocab  # no token
    draft[3] = target[3, :n] = (
        2 * draft[3]
    )  # twice the target: rejected half of the time, and no difference is left over
    target[3, 0] = draft[3, 0] * np.float32(1e-30)
    target[4, 0] = 0  # nothing to draw
    target[5, 0, 7] = np.nan
    target[5, 0, 3] = 0
    draft[6, 0, 7] = np.inf
    target[6, 0, 3] = 0
    target[7] = 0
    a = backend_arrays.array
    args = (a(draft), a(ids), a(target))
    got, _, emitted, valid = pyinfer.chain_speculative_sampling(*args, seed=1, return_valid=True)
    got, emitted, valid = (backend_arrays.numpy(x) for x in (got, emitted, valid))
    np.testing.assert_array_equal(valid, [1, 1, 1, 1, 0, 0, 0, 0])
    assert (emitted[:8] == 0).all()
    assert (got[4:, 0] == 0).all() and (got[:, 1:] == -1).all()
    rows = np.arange(3)
    assert (target[rows, 0, got[:3, 0]] > draft[rows, 0, got[:3, 0]]).all()
    assert target[3, 0, got[3, 0]] > 0
    with pytest.raises(ValueError, match=r"probs cannot be sampled.*output 4, 5, 6, 7, wanted"):
        pyinfer.chain_speculative_sampling(*args, seed=1, check_nan=True)


def test_strides_and_generators(backend_arrays, rng):
    import torch

    requests, n, vocab = 4, 3, 77
    draft, ids, target = problem(rng, requests, n, vocab)
    a = backend_arrays.array
    want = backend_arrays.numpy(pyinfer.chain_speculative_sampling(a(draft), a(ids), a(target), seed=8)[0])
    padded = [a(np.pad(x, ((0, 0), (1, 2), (3, 4))))[:, 1:-2, 3:-4] for x in (draft, target)]
    got = pyinfer.chain_speculative_sampling(padded[0], a(ids), padded[1], seed=8)[0]
    np.testing.assert_array_equal(backend_arrays.numpy(got), want)
    g = torch.Generator().manual_seed(3)
    args = (a(draft), a(ids), a(target))
    first, second = (
        backend_arrays.numpy(pyinfer.chain_speculative_sampling(*args, generator=g)[0]).tolist() for _ in range(2)
    )
    again = pyinfer.chain_speculative_sampling(*args, generator=torch.Generator().manual_seed(3))[0]
    assert backend_arrays.numpy(again).tolist() == first != second


def test_no_requests(backend):
    f = pyinfer.chain_speculative_sampling
    ids, accepted, emitted = f(
        backend.array(np.zeros((0, 2, 9), np.float32)),
        backend.array(np.zeros((0, 2), np.int32)),
        backend.array(np.zeros((0, 3, 9), np.float32)),
    )
    assert [backend.numpy(x).shape for x in (ids, accepted, emitted)] == [(0, 3), (0,), (0,)]
    assert all(backend.is_own(x) for x in (ids, accepted, emitted))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"draft": np.zeros((2, 4, 9), np.float32)}, ValueError, "draft_probs has the wrong shape.*wanted"),
        ({"draft": np.zeros((2, 3, 9), np.float16)}, TypeError, "draft_probs has another dtype than target_probs: got float16"),
        ({"target": np.zeros((2, 9), np.float32)}, ValueError, "target_probs"),
        ({"target": np.zeros((2, 0, 9), np.float32)}, ValueError, "target_probs has no position"),
        ({"target": np.zeros((2, 4, 0), np.float32)}, ValueError, "target_probs has an unsupported vocabulary: got 0"),
        ({"ids": np.zeros((2, 3), np.float32)}, TypeError, "draft_token_ids has the wrong dtype"),
        ({"ids": np.zeros((2, 2), np.int32)}, ValueError, "draft_token_ids has the wrong shape"),
        ({"accepted": np.zeros(3, np.int32)}, ValueError, "maybe_output_accepted_token_num has the wrong shape"),
        ({"emitted": np.zeros(2, np.int64)}, TypeError, "maybe_output_emitted_draft_token_num has the wrong dtype"),
        ({"seed": np.zeros(3, np.int64)}, ValueError, "seed"),
        ({"offset": 3}, ValueError, "offset comes without a seed"),
        ({"target": np.zeros((2, 4, 18), np.float32)[:, :, ::2]}, ValueError, "target_probs"),
    ],
)  # fmt: skip
def test_bad_arguments(backend, change, error, text):
    arguments = {
        "draft": np.full((2, 3, 9), 1 / 9, np.float32),
        "ids": np.zeros((2, 3), np.int32),
        "target": np.full((2, 4, 9), 1 / 9, np.float32),
        "accepted": None,
        "emitted": None,
    }
    streams = {k: v for k, v in change.items() if k in ("seed", "offset")}
    arguments.update({k: v for k, v in change.items() if k not in streams})

    def put(x):
        if not isinstance(x, np.ndarray):
            return x
        if not x.flags.c_contiguous:  # keep the strides
            return backend.array(np.ascontiguousarray(x.base))[:, :, ::2]
        return backend.array(x)

    with pytest.raises(error, match=f"^chain_speculative_sampling: {text}"):
        pyinfer.chain_speculative_sampling(
            *(put(v) for v in arguments.values()), **{k: put(v) for k, v in streams.items()}
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_cpu(backend_arrays, rng, dtype):
    from tests.arrays import NUMPY_DTYPES

    for requests, n, vocab in ((5, 3, 32_000), (2, 1, 128_257), (300, 4, 31)):
        draft, ids, target = problem(rng, requests, n, vocab)
        draft, target = (x.astype(NUMPY_DTYPES.get(dtype, np.float32)) for x in (draft, target))
        want = pyinfer.chain_speculative_sampling(draft, ids, target, seed=77, offset=2)
        got = pyinfer.chain_speculative_sampling(
            *(backend_arrays.array(x) for x in (draft, ids, target)), seed=77, offset=2
        )
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(backend_arrays.numpy(x), y)
