"""The replay of a plan: every block runs once, nothing overlaps, the order is the launch order."""

from __future__ import annotations

import numpy as np
import pytest

from pyinfer.profiler.plan_view import draw_plan, simulate
from pyinfer.schedulers.decode import decode_plan
from pyinfer.schedulers.prefill import prefill_plan

pytestmark = pytest.mark.cpu


def _plan(rng, kind: str, batch: int = 5):
    kv_len = rng.integers(1, 900, batch)
    common = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, page_size=16, tile_kv=64, num_sms=12)
    pages = -(-kv_len // 16)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = (kv_len - 16 * (pages - 1)).astype(np.int32)
    if kind == "decode":
        return decode_plan(indptr, indices, last, tile_q=16, **common)
    qo = np.concatenate([[0], np.cumsum(np.minimum(kv_len, rng.integers(1, 300, batch)))]).astype(np.int32)
    return prefill_plan(qo, indptr, indices, last, tile_q=64, causal=True, **common)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("ctas_per_sm", [1, 3])
def test_replay(rng, kind, ctas_per_sm):
    plan = _plan(rng, kind)
    t = simulate(plan, 12, ctas_per_sm, overhead=7)
    blocks = len(plan.work) * plan.num_kv_heads
    assert sorted(zip(t.item.tolist(), t.kv_head.tolist(), strict=True)) == [
        (i, h) for i in range(len(plan.work)) for h in range(2)
    ]
    np.testing.assert_array_equal(t.stop - t.start, 7 + plan.work[t.item, 4] - plan.work[t.item, 3])
    assert len(t.sm) == blocks and t.sm.min() >= 0 and t.sm.max() < 12 and t.lane.max() < ctas_per_sm
    for sm in range(12):
        for lane in range(ctas_per_sm):
            own = (t.sm == sm) & (t.lane == lane)
            order = np.argsort(t.start[own])
            assert (t.start[own][order][1:] >= t.stop[own][order][:-1]).all()
    # Blocks start in launch order: hardware does not look ahead.
    assert (np.diff(t.start) >= 0).all()
    # Nobody waits while a slot is free: a block starts when the first slot falls free.
    assert t.length <= t.start[-1] + (t.stop - t.start).max()
    assert 0 < t.efficiency(12, ctas_per_sm) <= 1


def test_one_sm_is_always_busy(rng):
    assert simulate(_plan(rng, "decode"), 1).efficiency(1) == 1.0


@pytest.mark.parametrize(("name", "arguments"), [("num_sms", (0,)), ("ctas_per_sm", (4, 0)), ("overhead", (4, 1, -1))])
def test_bad_arguments(rng, name, arguments):
    with pytest.raises(ValueError, match=f"simulate: {name} is too small"):
        simulate(_plan(rng, "decode"), *arguments)


def test_picture_has_a_bar_for_every_block(rng):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    plan = _plan(rng, "prefill")
    ax = draw_plan(plan, 12)
    assert len(ax.collections[0].get_paths()) == len(plan.work) * plan.num_kv_heads
    assert "5 requests" in ax.get_title(loc="left")
    assert [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()] == [f"request {i}" for i in range(5)]


def test_empty_batch():
    zero = np.zeros(1, np.int32)
    plan = decode_plan(
        zero,
        zero[:0],
        zero[:0],
        num_qo_heads=8,
        num_kv_heads=2,
        head_dim_qk=64,
        page_size=16,
        tile_q=16,
        tile_kv=64,
        num_sms=4,
    )
    assert simulate(plan, 4).length == 0
    assert simulate(plan, 4).efficiency(4) == 1.0
