"""A million draws of every sampler against the analytic distribution (chi-square), streams against each other, large vocabularies."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer import sampling as S
from tests.reference import sampling as ref
from tests.sampling_inputs import spread_probs

DRAWS, VOCAB = 1_000_000, 32
SIGMAS = 5.0  # of the statistic: a false alarm in 3.5 million runs of a case
K, Q, M = 11, 0.8, 0.08

# name: (arguments of the reference's filter, from logits, the call)
SAMPLERS = {
    "sampling_from_probs": ({}, False, lambda x, **kw: S.sampling_from_probs(x, **kw)),
    "sampling_from_logits": ({}, True, lambda x, **kw: S.sampling_from_logits(x, **kw)),
    "top_k": (dict(top_k=K), False, lambda x, **kw: S.top_k_sampling_from_probs(x, K, **kw)),
    "top_p": (dict(top_p=Q), False, lambda x, **kw: S.top_p_sampling_from_probs(x, Q, **kw)),
    "min_p": (dict(min_p=M), False, lambda x, **kw: S.min_p_sampling_from_probs(x, M, **kw)),
    "top_k_first": (
        dict(top_k=K, top_p=Q), False, lambda x, **kw: S.top_k_top_p_sampling_from_probs(x, K, Q, **kw)
    ),
    "joint": (
        dict(top_k=K, top_p=Q, joint=True), False,
        lambda x, **kw: S.top_k_top_p_sampling_from_probs(x, K, Q, filter_apply_order="joint", **kw),
    ),
    "top_k_first from logits": (
        dict(top_k=K, top_p=Q), True, lambda x, **kw: S.top_k_top_p_sampling_from_logits(x, K, Q, **kw)
    ),
    "joint from logits": (
        dict(top_k=K, top_p=Q, joint=True), True,
        lambda x, **kw: S.top_k_top_p_sampling_from_logits(x, K, Q, filter_apply_order="joint", **kw),
    ),
}  # fmt: skip


def streams(b, rng, kind, draws):
    """Seeds and offsets as servers give them: one call of many outputs, a seed for each request, one request's tokens."""
    start = int(rng.integers(2**40))
    return {
        "one call": dict(seed=start, offset=int(rng.integers(2**40))),
        "seeds in a row": dict(seed=b.array(np.arange(start, start + draws)), offset=7),
        "offsets in a row": dict(seed=start, offset=b.array(np.arange(draws))),
    }[kind]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_million_draws(backend_arrays, rng, name):
    b = backend_arrays
    arguments, from_logits, call = SAMPLERS[name]
    kept = 0
    while not 3 < kept < VOCAB:  # some draws leave a filter one or two tokens
        logits = (rng.standard_normal((1, VOCAB)) * 1.3).astype(np.float32)
        logits[0, rng.integers(VOCAB)] = -np.inf
        p = S.softmax(logits)  # checked against float64 elsewhere
        keep = ref.kept(p[0], **arguments)
        kept = keep.sum()
    kind = ("one call", "seeds in a row", "offsets in a row")[list(SAMPLERS).index(name) % 3]
    x = b.array(logits if from_logits else p)
    ids, valid = call(x, indices=b.array(np.zeros(DRAWS, np.int32)), **streams(b, rng, kind, DRAWS), return_valid=True)
    ids = b.numpy(ids)
    assert b.numpy(valid).all() and ids.min() >= 0 and ids.max() < VOCAB
    observed = np.bincount(ids, minlength=VOCAB)
    assert not observed[~keep].any(), "a token was drawn that the filter drops"
    expected = ref.renorm(p[0], keep) * DRAWS
    assert ref.chi_square_sigmas(observed[keep], expected[keep]) < SIGMAS


@pytest.mark.parametrize("kind", ["one call", "seeds in a row", "offsets in a row"])
def test_neighbours_are_independent(backend_arrays, rng, kind):
    """Pairs of consecutive draws, each pair counted once, against the product of the distribution with itself."""
    b, vocab = backend_arrays, 12
    p = spread_probs(rng, 1, vocab, 0.7)
    ids = b.numpy(S.sampling_from_probs(b.array(p), b.array(np.zeros(DRAWS, np.int32)), **streams(b, rng, kind, DRAWS)))
    expected = np.outer(p[0], p[0]).astype(np.float64)
    for distance in (1, 2, 64):
        first = ids[: DRAWS - DRAWS % (2 * distance)].reshape(-1, 2, distance)
        pairs = np.bincount((first[:, 0] * vocab + first[:, 1]).reshape(-1), minlength=vocab * vocab)
        want = expected.reshape(-1) / expected.sum() * pairs.sum()
        assert ref.chi_square_sigmas(pairs, want) < SIGMAS, distance


def test_a_million_speculative_tokens(backend_arrays, rng):
    """One draft from the draft row: the first token is the target's, whether the draft passed or not; the second, if it did, the bonus row's."""
    b, vocab = backend_arrays, 12
    draft, target = spread_probs(rng, 1, vocab, 1.0), spread_probs(rng, 2, vocab, 1.0)
    p = draft[0].astype(np.float64)
    ids = rng.choice(vocab, DRAWS, p=p / p.sum()).astype(np.int32)[:, None]
    wide = [b.array(x).expand(DRAWS, *x.shape) for x in (draft, target)]
    got, accepted, emitted = S.chain_speculative_sampling(
        wide[0], b.array(ids), wide[1], seed=int(rng.integers(2**62)), offset=3
    )
    got, accepted, emitted = b.numpy(got), b.numpy(accepted), b.numpy(emitted)
    assert (accepted == emitted).all() and set(np.unique(emitted)) == {0, 1}
    assert (got[emitted == 0, 1] == -1).all() and (got[emitted == 1, 0] == ids[emitted == 1, 0]).all()
    for tokens, row in ((got[:, 0], target[0]), (got[emitted == 1, 1], target[1])):
        expected = row.astype(np.float64) / row.astype(np.float64).sum() * len(tokens)
        assert ref.chi_square_sigmas(np.bincount(tokens, minlength=vocab), expected) < SIGMAS


@pytest.mark.parametrize("filtered", [False, True], ids=["all", "top_k_top_p"])
@pytest.mark.parametrize("vocab", [128_256, 262_144])
def test_large_vocabularies(backend_arrays, device, rng, vocab, filtered):
    """Draws over 200 stretches of ids; the last id of the vocabulary can be drawn."""
    b = backend_arrays
    draws = 200_000 if device == "cuda" else (400 if filtered else 4000)
    logits = (rng.standard_normal((1, vocab)) * 2).astype(np.float32)
    logits[0, -1] = 12.0
    p = S.softmax(logits)
    index = b.array(np.zeros(draws, np.int32))
    seed = int(rng.integers(2**62))
    if filtered:
        k, q = 30_000, 0.9
        ids = S.top_k_top_p_sampling_from_probs(b.array(p), k, q, index, "joint", seed=seed)
        order = np.argsort(-p[0], kind="stable")
        above = np.concatenate([[0.0], np.cumsum(p[0][order].astype(np.float64))[:-1]])
        keep = np.zeros(vocab, bool)
        keep[order[: min(int((above < q).sum()), k)]] = True
    else:
        ids = S.sampling_from_logits(b.array(logits), index, seed=seed)
        keep = p[0] > 0
    ids = b.numpy(ids)
    assert ids.min() >= 0 and ids.max() < vocab
    if not filtered:
        assert (ids == vocab - 1).any()
    # float64 sums may put the boundary one token off; no more than that is drawn outside.
    assert (~keep[ids]).sum() <= 3
    stretch = np.arange(vocab) * 200 // vocab
    observed = np.bincount(stretch[ids], minlength=200)
    expected = np.bincount(stretch, weights=ref.renorm(p[0], keep), minlength=200) * draws
    assert ref.chi_square_sigmas(observed, expected) < SIGMAS


def test_greedy_ties_at_every_place(backend_arrays, rng):
    """top_k = 1 with equal largest values anywhere, vocabularies of every block's and cluster's size: the lowest of their ids."""
    b = backend_arrays
    for vocab in (3, 1000, 8200, 40_000, 128_256, 262_144):
        logits = rng.standard_normal((4, vocab)).astype(np.float32)
        places = [np.sort(rng.choice(vocab, min(3, vocab), replace=False)) for _ in range(4)]
        for row, at in zip(logits, places, strict=True):
            row[at] = 20.0
        want = [int(at[0]) for at in places]
        for x, call in (
            (logits, lambda x: S.top_k_top_p_sampling_from_logits(x, 1, 1.0, seed=3)),
            (S.softmax(logits), lambda x: S.top_k_sampling_from_probs(x, 1, seed=4)),
            (
                S.softmax(logits),
                lambda x: S.top_k_top_p_sampling_from_probs(x, 1, 0.3, filter_apply_order="joint", seed=5),
            ),
        ):
            assert b.numpy(call(b.array(x))).tolist() == want, vocab


def test_rows_that_cannot_be_sampled_at_262144(backend_arrays, rng):
    """NaN, all zero, all -inf in rows of the largest vocabulary: reported, id 0, and the rows between are as without them."""
    b, vocab = backend_arrays, 262_144
    p = spread_probs(rng, 4, vocab, 1.0)
    clean = p.copy()
    p[1, vocab - 1] = np.nan
    p[2] = 0
    seed = b.array(np.arange(4))
    for call in (
        lambda x: S.sampling_from_probs(x, seed=seed, return_valid=True),
        lambda x: S.top_k_top_p_sampling_from_probs(x, 50, 0.9, seed=seed, return_valid=True),
        lambda x: S.min_p_sampling_from_probs(x, 0.5, seed=seed, return_valid=True),
    ):
        ids, valid = (b.numpy(x) for x in call(b.array(p)))
        assert valid.tolist() == [True, False, False, True] and ids[1] == ids[2] == 0
        whole, all_valid = (b.numpy(x) for x in call(b.array(clean)))
        assert all_valid.all() and (ids == whole)[[0, 3]].all()
    with np.errstate(divide="ignore"):
        logits = np.log(p)
    ids, valid = (b.numpy(x) for x in S.sampling_from_logits(b.array(logits), seed=seed, return_valid=True))
    assert valid.tolist() == [True, False, False, True] and ids[1] == ids[2] == 0
    with pytest.raises(ValueError, match=r"cannot be sampled: got NaN or nothing to draw from at output 1, 2, wanted"):
        S.sampling_from_probs(b.array(p), seed=seed, check_nan=True)
