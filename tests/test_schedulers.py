"""Plans: every (row, visible key) exactly once, exact sizes, capacity, and how well work is spread."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyinfer import schedulers
from pyinfer.schedulers import (
    AttentionPlan,
    PlanCapacity,
    decode_capacity,
    decode_plan,
    prefill_capacity,
    prefill_plan,
    single_schedule,
)

LENGTHS = st.lists(st.integers(0, 700), min_size=0, max_size=9)
DEVICE = st.fixed_dictionaries(
    {
        "tile_kv": st.sampled_from([16, 64, 128]),
        "num_sms": st.sampled_from([1, 2, 7, 132]),
        "ctas_per_sm": st.integers(1, 3),
    }
)
HEADS = st.sampled_from([(1, 1), (8, 8), (8, 2), (7, 1), (6, 2), (32, 4)])
SPLIT = st.sampled_from([{}, {"disable_split_kv": True}, {"fixed_split_size": 1}, {"fixed_split_size": 5}])


def table(lens, page_size):
    lens = np.asarray(lens, np.int64)
    pages = -(-lens // page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 0).astype(np.int32)
    return indptr, np.arange(indptr[-1], dtype=np.int32)[::-1].copy(), last


def visible(token: int, qo_len: int, kv_len: int, causal: bool, window_left: int) -> tuple[int, int]:
    """From the definition: the keys query `token` sees, as a range."""
    position = kv_len - qo_len + token
    keys = [
        j for j in range(kv_len) if (not causal or j <= position) and (window_left < 0 or j >= position - window_left)
    ]
    return (keys[0], keys[-1] + 1) if keys else (0, 0)


def check_plan(plan: AttentionPlan, qo_lens, kv_lens) -> None:
    group = plan.group_size
    assert plan.work.shape == (plan.n_work, 8) and plan.work.dtype == np.int32
    covered = {}  # (request, packed row) -> list of ranges
    slots = np.zeros(plan.num_partials, int)
    semaphores = set()
    tiles = {}
    for request, row, rows, kv0, kv1, split, splits, slot in plan.work.tolist():
        assert 0 <= request < plan.batch_size and 1 <= rows <= plan.tile_q
        assert row >= 0 and row + rows <= qo_lens[request] * group
        assert 0 <= kv0 <= kv1 <= kv_lens[request]
        assert 0 <= split < splits
        tiles.setdefault((request, row), []).append((split, splits, slot, kv0, kv1))
        if splits > 1:
            slots[slot + split] += 1
            semaphores.add(slot)
        else:
            assert slot == 0
        for r in range(row, row + rows):
            covered.setdefault((request, r), []).append((kv0, kv1))
    assert (slots == 1).all(), "every partial slot belongs to exactly one split"
    for (request, row), items in tiles.items():
        items.sort()
        assert [s for s, *_ in items] == list(range(items[0][1])), f"tile {request, row} lacks a split"
        assert len({(n, slot) for _, n, slot, _, _ in items}) == 1
        for (*_, end), (_, _, _, begin, _) in itertools.pairwise(items):
            assert end == begin, "the splits of a tile follow one another"
    assert len(semaphores) == sum(items[0][1] > 1 for items in tiles.values())
    assert set(covered) == {(b, r) for b, n in enumerate(qo_lens) for r in range(n * group)}
    for (b, r), ranges in covered.items():
        begin, end = visible(r // group, qo_lens[b], kv_lens[b], plan.causal, plan.window_left)
        low, high = min(x for x, _ in ranges), max(y for _, y in ranges)
        assert sum(y - x for x, y in ranges) == high - low, "no key twice"
        assert begin == end or (low <= begin and end <= high), (
            f"request {b} row {r} sees {begin}..{end}, planned {low}..{high}"
        )
    lengths = plan.work[:, 4] - plan.work[:, 3]
    assert (np.diff(lengths) <= 0).all(), "longest first"
    if plan.kv_chunk:
        assert lengths.max(initial=0) <= plan.kv_chunk
    partials = plan.max_partials * plan.num_kv_heads * plan.tile_q
    assert plan.workspace_bytes == -(-4 * partials * plan.head_dim_vo // 16) * 16 + 4 * partials
    check_packing(plan)


def check_packing(plan: AttentionPlan) -> None:
    packed, at = plan.pack(), plan.offsets
    assert packed.dtype == np.int32 and packed.size == at.total and not packed.flags.writeable
    assert packed[:3].tolist() == [plan.n_work, plan.num_partials, plan.batch_size] and not packed[3:16].any()
    assert all(offset % 4 == 0 for offset in at if offset >= 0)
    for offset, values in (
        (at.work, plan.work),
        (at.qo_indptr, plan.qo_indptr),
        (at.kv_indptr, plan.kv_indptr),
        (at.kv_len, plan.kv_len),
    ):
        assert (packed[offset : offset + values.size] == values.reshape(-1)).all()
    if at.kv_indices >= 0:
        assert (packed[at.kv_indices : at.kv_indices + len(plan.kv_indices)] == plan.kv_indices).all()
    assert not packed[at.semaphore :].any() and at.total - at.semaphore >= plan.max_partials * plan.num_kv_heads
    target = np.full(at.total + 5, -1, np.int32)
    plan.copy_into(target)
    assert (target[: at.total] == packed).all() and (target[at.total :] == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    lens=LENGTHS, heads=HEADS, page_size=st.sampled_from([1, 3, 16]), tile_q=st.sampled_from([1, 4, 16]), window=st.sampled_from([-1, 0, 50]),
    device=DEVICE, split=SPLIT,
)  # fmt: skip
def test_decode_plan(lens, heads, page_size, tile_q, window, device, split):
    indptr, indices, last = table(lens, page_size)
    kw = dict(
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim_qk=64,
        page_size=page_size,
        tile_q=tile_q,
        window_left=window,
        **device,
        **split,
    )
    plan = decode_plan(indptr, indices, last, **kw)
    assert plan.kv_len.tolist() == lens and plan.max_page == (len(indices) - 1)
    # A decode query stands at the last key: without a mask, and with or without one it sees the same.
    check_plan(plan, [1] * len(lens), lens)
    again = decode_plan(indptr, indices, last, **kw)
    assert (again.pack() == plan.pack()).all(), "deterministic"
    bound = decode_capacity(
        len(lens), len(indices), num_qo_heads=heads[0], num_kv_heads=heads[1], page_size=page_size, tile_q=tile_q, num_sms=device["num_sms"],
        ctas_per_sm=device["ctas_per_sm"], **split,
    )  # fmt: skip
    fixed = decode_plan(indptr, None, last, capacity=bound, **kw)
    assert (fixed.work == plan.work).all() and fixed.max_work == bound.max_work >= plan.n_work
    check_plan(fixed, [1] * len(lens), lens)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 300)), max_size=6), heads=HEADS, page_size=st.sampled_from([0, 1, 16]), causal=st.booleans(),
    tile_q=st.sampled_from([3, 16, 64]), window=st.sampled_from([-1, 0, 20]), device=DEVICE, split=SPLIT,
)  # fmt: skip
def test_prefill_plan(requests, heads, page_size, causal, tile_q, window, device, split):
    qo, kv = [n for n, _ in requests], [m for _, m in requests]
    qo_indptr = np.concatenate([[0], np.cumsum(qo)]).astype(np.int32)
    kw = dict(
        num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim_qk=64, head_dim_vo=40, page_size=page_size, tile_q=tile_q, causal=causal, window_left=window,
        **device, **split,
    )  # fmt: skip
    paged = table(kv, page_size) if page_size else (np.concatenate([[0], np.cumsum(kv)]).astype(np.int32), None, None)
    plan = prefill_plan(qo_indptr, *paged, **kw)
    check_plan(plan, qo, kv)
    bound = prefill_capacity(
        len(qo), int(sum(qo)), int(paged[0][-1]), num_qo_heads=heads[0], num_kv_heads=heads[1], page_size=page_size, tile_q=tile_q,
        num_sms=device["num_sms"], ctas_per_sm=device["ctas_per_sm"], **split,
    )._replace(max_indices=int(paged[0][-1]) if page_size else 0)  # fmt: skip
    fixed = prefill_plan(qo_indptr, *paged, capacity=bound, **kw)
    assert (fixed.work == plan.work).all()
    check_plan(fixed, qo, kv)


@settings(max_examples=100, deadline=None)
@given(
    qo_len=st.integers(0, 300), kv_len=st.integers(0, 5000), heads=HEADS, tile_q=st.sampled_from([16, 64]), causal=st.booleans(),
    window=st.sampled_from([-1, 0, 400]), device=DEVICE,
)  # fmt: skip
@example(
    qo_len=300,
    kv_len=4000,
    heads=(8, 8),
    tile_q=64,
    causal=False,
    window=400,
    device={"tile_kv": 64, "num_sms": 132, "ctas_per_sm": 3},
)
def test_single_schedule_covers_every_tile(qo_len, kv_len, heads, tile_q, causal, window, device):
    s = single_schedule(
        qo_len,
        kv_len,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim_vo=64,
        tile_q=tile_q,
        causal=causal,
        window_left=window,
        **device,
    )
    group = heads[0] // heads[1]
    rows = qo_len * group
    assert s.num_tiles == -(-rows // tile_q)
    if s.num_splits == 1:
        assert s.kv_chunk == 0 and s.workspace_bytes == 0
        return
    assert s.kv_chunk % device["tile_kv"] == 0
    partials = s.num_tiles * s.num_splits * heads[1] * tile_q
    assert s.workspace_bytes == 65536 + 4 * partials * 65
    assert s.num_tiles * heads[1] * 4 <= 65536
    assert s.num_tiles * s.num_splits * heads[1] <= max(device["num_sms"] * device["ctas_per_sm"], heads[1])
    for row in range(0, rows, tile_q):
        count = min(tile_q, rows - row)
        first, last = row // group, (row + count - 1) // group
        ranges = [visible(t, qo_len, kv_len, causal, window) for t in (first, last)]
        seen = [r for r in ranges if r[1] > r[0]]
        if seen:
            assert max(e for _, e in seen) - min(b for b, _ in seen) <= s.kv_chunk * s.num_splits


def makespan(plan: AttentionPlan, workers: int, cost: int) -> int:
    """List scheduling of the plan's items in their order."""
    load = np.zeros(workers, int)
    for length in np.repeat(plan.work[:, 4] - plan.work[:, 3], plan.num_kv_heads):
        load[load.argmin()] += length + cost
    return int(load.max())


@pytest.mark.parametrize(
    "lens,within",
    [
        ([4096] * 64, 1.15),
        ([131072], 1.15),
        ([2048] * 40, 1.3),
        ([512] * 63 + [65536], 1.3),  # one long request among many short ones
        ([1] * 200, 1.6),
        (list(range(1, 4000, 37)), 1.15),
    ],
    ids=["b64", "b1", "b40", "skewed", "tiny", "ramp"],
)
def test_decode_work_is_balanced(lens, within):
    indptr, indices, last = table(lens, 16)
    plan = decode_plan(
        indptr,
        indices,
        last,
        num_qo_heads=32,
        num_kv_heads=8,
        head_dim_qk=128,
        page_size=16,
        tile_q=16,
        tile_kv=64,
        num_sms=132,
        ctas_per_sm=2,
    )
    ideal = (sum(lens) * 8 + 64 * 8 * len(lens)) / 264
    assert makespan(plan, 264, 64) <= within * max(ideal, 65 + 64)


def test_fixed_split_does_not_look_at_the_batch():
    kw = dict(
        num_qo_heads=4,
        num_kv_heads=1,
        head_dim_qk=64,
        page_size=16,
        tile_q=4,
        tile_kv=64,
        num_sms=8,
        fixed_split_size=4,
    )
    alone = decode_plan(*table([1000], 16), **kw)
    among = decode_plan(*table([30, 1000, 5000], 16), **kw)
    mine = among.work[among.work[:, 0] == 1]
    assert sorted(map(tuple, alone.work[:, 3:7].tolist())) == sorted(map(tuple, mine[:, 3:7].tolist()))


@pytest.mark.parametrize("field", ["max_work", "max_partials", "max_batch", "max_indices"])
def test_capacity_is_respected(field):
    kw = dict(num_qo_heads=4, num_kv_heads=1, head_dim_qk=64, page_size=16, tile_q=4, tile_kv=64, num_sms=8)
    tab = table([5000, 5000], 16)
    plan = decode_plan(*tab, **kw)
    enough = PlanCapacity(plan.n_work, plan.num_partials, 2, len(tab[1]))
    decode_plan(*tab, capacity=enough, **kw)
    short = enough._replace(**{field: getattr(enough, field) - 1})
    with pytest.raises(
        ValueError,
        match=rf"outgrows the plan's capacity: got \d+, wanted at most {getattr(short, field)} \(capacity\.{field}\)",
    ):
        decode_plan(*tab, capacity=short, **kw)


def broken(change):
    tab = [x.copy() for x in table([40, 17, 5], 16)]
    change(*tab)
    return tab


def _set(array, at, value):
    array[at] = value


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda p, i, n: _set(p, 0, 1), "paged_kv_indptr does not start at 0: got 1, wanted 0"),
        (
            lambda p, i, n: _set(p, 2, 1),
            "paged_kv_indptr decreases: got 1 at entry 2 after 3, wanted a non-decreasing sequence",
        ),
        (
            lambda p, i, n: _set(n, 1, 17),
            r"paged_kv_last_page_len is out of range: got 17 for request 1 \(2 pages\), wanted 1..16",
        ),
        (
            lambda p, i, n: _set(n, 2, 0),
            r"paged_kv_last_page_len is out of range: got 0 for request 2 \(1 pages\), wanted 1..16",
        ),
        (lambda p, i, n: _set(n, 0, -1), "paged_kv_last_page_len is out of range: got -1 for request 0"),
        (
            lambda p, i, n: _set(p, 3, 9),
            r"paged_kv_indices is too short: got 6, wanted at least 9 \(paged_kv_indptr\[-1\]\)",
        ),
        (lambda p, i, n: _set(i, 4, -3), "paged_kv_indices holds a negative page: got -3 at entry 4, wanted 0 or more"),
    ],
)
def test_malformed_page_tables(change, message):
    with pytest.raises(ValueError, match=f"decode_plan: {message}"):
        decode_plan(
            *broken(change),
            num_qo_heads=4,
            num_kv_heads=1,
            head_dim_qk=64,
            page_size=16,
            tile_q=4,
            tile_kv=64,
            num_sms=8,
        )


def test_more_malformed_metadata():
    kw = dict(num_qo_heads=4, num_kv_heads=1, head_dim_qk=64, page_size=16, tile_q=4, tile_kv=64, num_sms=8)
    indptr, indices, last = table([40], 16)
    for args, message in (
        ((indptr, indices, last[:0]), "paged_kv_last_page_len has the wrong length: got 0, wanted 1"),
        ((indptr[:0], indices, last), "paged_kv_indptr is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_plan(*args, **kw)
    with pytest.raises(
        ValueError, match="num_qo_heads does not divide among the kv heads: got 4 query heads, 3 kv heads"
    ):
        decode_plan(indptr, indices, last, **{**kw, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="page_size is no page size: got 0"):
        decode_plan(indptr, indices, last, **{**kw, "page_size": 0})
    with pytest.raises(ValueError, match="qo_indptr decreases: got 2 at entry 2 after 3"):
        prefill_plan(np.array([0, 3, 2], np.int32), np.array([0, 3, 5], np.int32), **{**kw, "page_size": 0})
    with pytest.raises(ValueError, match=r"qo_indptr has the wrong length: got 2, wanted 3 \(as kv_indptr\)"):
        prefill_plan(np.array([0, 3], np.int32), np.array([0, 3, 5], np.int32), **{**kw, "page_size": 0})
    plan = decode_plan(indptr, indices, last, **kw)
    with pytest.raises(
        ValueError, match=r"AttentionPlan.copy_into: buffer is too small: got 3 int32, wanted at least \d+"
    ):
        plan.copy_into(np.zeros(3, np.int32))
    with pytest.raises(TypeError, match="buffer has the wrong dtype: got float32, wanted int32"):
        plan.copy_into(np.zeros(3, np.float32))


def test_lengths_fit(rng):
    """The largest page that is used, in tables with pages to spare; -2 for each way to be malformed. Compiled and interpreted alike."""
    from pyinfer.schedulers import lazy

    for kernels in (lazy.wait(), lazy._plain()):
        for _ in range(20):
            lens = rng.integers(0, 50, rng.integers(1, 6)).astype(np.int32)
            spare = rng.integers(0, 3, len(lens))
            indptr = np.concatenate([[0], np.cumsum(-(-lens // 4) + spare)]).astype(np.int32)
            indices = rng.permutation(indptr[-1] + 5).astype(np.int32)
            qo = np.arange(len(lens) + 1, dtype=np.int32)
            used = np.concatenate([indices[b : b - (-n // 4)] for b, n in zip(indptr, lens, strict=False)])
            args = (qo, indptr, lens, indices, True, 4)
            assert kernels.lengths_fit(*args) == used.max(initial=-1)
            assert kernels.lengths_fit(*args[:4], False, 4) == -1
            unused = np.setdiff1d(indices, used)
            if len(unused):
                assert (
                    kernels.lengths_fit(
                        *args[:3], np.where(indices == unused[0], -1, indices).astype(np.int32), True, 4
                    )
                    >= -1
                )
            too_long = lens.copy()
            too_long[-1] = (indptr[-1] - indptr[-2]) * 4 + 1
            later = [x + np.int32(1) for x in (qo, indptr)]
            bad = [(later[0], *args[1:]), (qo, later[1], *args[2:]), (qo[:-1], *args[1:]), (qo, indptr[:-1], *args[2:])]
            bad += [(qo[::-1].copy(), *args[1:]), (qo, indptr, -lens - 1, *args[3:]), (qo, indptr, too_long, *args[3:])]
            if len(used):
                bad += [(*args[:3], indices[: indptr[-1] - 1], True, 4)]
                bad += [(*args[:3], np.where(indices == used[-1], -1, indices).astype(np.int32), True, 4)]
            assert [kernels.lengths_fit(*x) for x in bad] == [-2] * len(bad)


def test_plan_is_immutable():
    plan = decode_plan(
        *table([40], 16), num_qo_heads=4, num_kv_heads=1, head_dim_qk=64, page_size=16, tile_q=4, tile_kv=64, num_sms=8
    )
    with pytest.raises(AttributeError):
        plan.tile_q = 5
    with pytest.raises(ValueError, match="read-only"):
        plan.work[0, 0] = 5
    assert "n_work=1" in repr(plan)


def test_import_brings_neither_numba_nor_tensors():
    code = "import sys, pyinfer.schedulers; bad = {'numba', 'cupy', 'torch'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(schedulers.__all__) <= set(dir(schedulers))
