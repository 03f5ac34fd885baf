"""The end of a cascade on a GPU, without one: which launches, in which order, and what the kernel that merges the levels makes of its parameters.

The kernel's index arithmetic (`cuda_src/cascade/merge_levels.cu.jinja`) is repeated here on host memory, block by block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer.jit.cascade import MERGE_LEVELS
from tests import stub_driver, stub_runtime
from tests.arrays import assert_close

pytestmark = pytest.mark.cpu
HEADS, DIM, PAGE = (6, 2), 64, 16
HIDDEN = -np.inf


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """cuda:0 is a Hopper GPU; the launches."""
    from pyinfer import _cascade_levels
    from pyinfer.core import tensormap
    from pyinfer.jit import attention_launch, attention_sm90

    caches = (
        _cascade_levels._kernel,
        tensormap.table,
        attention_launch._kernel,
        attention_launch._planned,
        attention_sm90.kernel_of,
    )
    monkeypatch.setattr(tensormap, "encode", lambda *layout: bytes(128))  # the driver's own work
    for cache in caches:
        cache.cache_clear()
    yield stub_runtime.install(monkeypatch)[1]
    for cache in caches:
        cache.cache_clear()


def planned(qo_lens: tuple[int, ...], prefix: int, workspace: Any = None) -> Any:
    n = len(qo_lens)
    wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(2, workspace)
    qo = np.cumsum([0, *qo_lens]).astype(np.int32)
    pages = -(-prefix // PAGE)
    wrapper.plan(
        [qo[[0, -1]], qo], [[0, pages], np.arange(n + 1)], [np.arange(pages), pages + np.arange(n)], [[(prefix - 1) % PAGE + 1], [PAGE] * n], *HEADS, DIM,
        PAGE, q_data_type="bfloat16",
    )  # fmt: skip
    return wrapper


def run(wrapper: Any, rows: int, pages: int, **options: Any) -> Any:
    import torch

    q = torch.zeros(rows, HEADS[0], DIM, dtype=torch.bfloat16)
    cache = torch.zeros(pages, 2, PAGE, HEADS[1], DIM, dtype=torch.bfloat16)
    return wrapper.run(q, cache, **options)


def test_launches(submitted):
    """Own keys first; then the shared ones, whose splits stay; then one kernel for both."""
    wrapper = planned((40, 1, 30), 4000)
    run(wrapper, 71, 253)
    names = [launch[0] for launch in submitted]
    assert [n.split("_")[0] for n in names] == ["prefill", "prefill", "merge"]
    own, shared = wrapper._levels[1].plan_info, wrapper._levels[0].plan_info
    assert own.num_partials == 0 and shared.num_partials > 4
    p = stub_driver.fields(MERGE_LEVELS, submitted[-1][2])
    assert submitted[-1][1] == (shared.n_work * HEADS[1], 1, 1)
    assert p["partial_o"] and p["partial_lse"] == p["partial_o"] + shared.partial_lse_offset
    assert p["lse"] == 0 and p["levels"] == 2 and p["group"] == 3 and p["v_scale"] == 1.0


def test_decode_kernels_merge_by_themselves(submitted):
    wrapper = planned((1, 1, 1), 4000)
    run(wrapper, 3, 253, v_scale=2.0, return_lse=True)
    assert wrapper._levels[0].plan_info.tile_q == 16
    p = stub_driver.fields(MERGE_LEVELS, submitted[-1][2])
    assert p["partial_o"] == p["partial_lse"] == 0 and p["lse"] and p["v_scale"] == 2.0


def floats(address: int, n: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))


def ints(address: int, n: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * n).from_address(address))


def merged_by_hand(
    p: dict[str, Any], blocks: int, v: np.ndarray, s: np.ndarray, out: np.ndarray, lse: np.ndarray
) -> None:
    """What the kernel does. v, s, out, lse: the tensors, float64; everything else by its address."""
    heads = p["num_kv_heads"] * p["group"]
    for block in range(blocks):
        item, kv_head = divmod(block, p["num_kv_heads"])
        if item >= ints(p["plan_header"], 1)[0]:
            continue
        request, row_begin, row_count, _, _, split, count, slot = (int(x) for x in ints(p["work"] + 32 * item, 8))
        rows = range(row_count * split // count, row_count * (split + 1) // count)
        num_splits = count if count > 1 and p["partial_o"] else 0
        qo_begin = int(ints(p["qo_indptr"] + 4 * request, 1)[0])
        for row in rows:
            token, member = divmod(row_begin + row, p["group"])
            head = kv_head * p["group"] + member
            places = [((slot + i) * p["num_kv_heads"] + kv_head) * p["tile_q"] + row for i in range(num_splits)]
            states = [
                (floats(p["partial_lse"] + 4 * x, 1)[0], floats(p["partial_o"] + 4 * x * DIM, DIM) * p["v_scale"])
                for x in places
            ]
            token += qo_begin
            first = int(num_splits > 0)
            states += [(s[i, token, head], v[i, token, head]) for i in range(first, p["levels"])]
            weights = np.exp2(np.array([x for x, _ in states], np.float64))
            assert out[token, head, 0] != out[token, head, 0], "written once"  # NaN before
            out[token, head] = sum(w * x for w, (_, x) in zip(weights, states, strict=True)) / max(weights.sum(), 1e-30)
            lse[token, head] = np.log2(weights.sum()) if weights.sum() else HIDDEN
    assert heads == out.shape[1]


@pytest.mark.parametrize(
    ("qo_lens", "prefix"),
    [((40, 1, 30), 4000), ((1, 0, 25), 900), ((300, 200, 800), 100)],
    ids=["split", "few rows", "whole"],
)
def test_every_row_is_merged_once(submitted, rng, qo_lens, prefix):
    """Random states for every row, laid out as docs/internals.md says partials are; a level that saw no key counts for nothing."""
    import torch

    from pyinfer._cascade_levels import States
    from pyinfer.core.tensor import view

    wrapper, rows = planned(qo_lens, prefix), sum(qo_lens)
    run(wrapper, rows, 300)
    submitted.clear()
    shared = wrapper._levels[0]
    plan = shared.plan_info
    states = States(2, view(torch.zeros(rows, HEADS[0], DIM, dtype=torch.bfloat16)), DIM)
    v, s = rng.standard_normal((2, rows, HEADS[0], DIM)), rng.standard_normal((2, rows, HEADS[0])) * 4
    s[1, rng.random((rows, HEADS[0])) < 0.3] = HIDDEN
    out, lse = torch.empty(rows, HEADS[0], DIM, dtype=torch.bfloat16), torch.empty(rows, HEADS[0])
    states.merge("test", out, lse, True, shared, 0.5, True)
    p = stub_driver.fields(MERGE_LEVELS, submitted[0][2])
    assert [p[n] for n in ("v", "s", "out", "lse")] == [x.data_ptr() for x in (states.v, states.s, out, lse)]
    assert (p["v_level"], p["s_level"]) == (rows * HEADS[0] * DIM, rows * HEADS[0])
    assert (p["out_token"], p["out_head"], p["lse_token"], p["lse_head"]) == (HEADS[0] * DIM, DIM, HEADS[0], 1)

    # Level 0 by the plan's own arrays: what each split of each row left.
    top, total, value = s[1].copy(), np.exp2(s[1]), np.exp2(s[1])[..., None] * v[1]
    partial_o = floats(shared._workspace_ptr, max(plan.partial_lse_offset // 4, 1))
    partial_lse = floats(
        shared._workspace_ptr + plan.partial_lse_offset, max(plan.num_partials * HEADS[1] * plan.tile_q, 1)
    )
    group = HEADS[0] // HEADS[1]
    for request, row_begin, row_count, _, _, split, count, slot in plan.work.tolist():
        for kv_head in range(HEADS[1]):
            for row in range(row_count):
                token, member = divmod(row_begin + row, group)
                token, head = token + int(plan.qo_indptr[request]), kv_head * group + member
                x, o, scale = s[0, token, head], v[0, token, head], 1.0
                if count > 1:
                    x, o, scale = rng.standard_normal() * 4, rng.standard_normal(DIM), 0.5
                    at = ((slot + split) * HEADS[1] + kv_head) * plan.tile_q + row
                    partial_lse[at], partial_o[at * DIM : (at + 1) * DIM] = x, o
                    x, o = float(partial_lse[at]), partial_o[at * DIM : (at + 1) * DIM].astype(np.float64)
                total[token, head] += np.exp2(x)
                value[token, head] += np.exp2(x) * scale * o
    got, got_lse = np.full((rows, HEADS[0], DIM), np.nan), np.full(top.shape, np.nan)
    merged_by_hand(p, submitted[0][1][0], v, s, got, got_lse)
    assert_close(got, value / total[..., None], rtol=1e-6, atol=1e-6)
    assert_close(got_lse, np.log2(total), rtol=1e-6, atol=1e-6, name="lse")


def test_a_given_workspace_holds_the_splits(submitted):
    """The levels share it; level 0 runs last, so that its splits are still there."""
    import torch

    workspace = torch.zeros(32 << 20, dtype=torch.uint8)
    wrapper = planned((40, 1, 30), 4000, workspace)
    run(wrapper, 71, 253)
    p = stub_driver.fields(MERGE_LEVELS, submitted[-1][2])
    assert workspace.data_ptr() <= p["partial_o"] < workspace.data_ptr() + 16
    first, second = (launch[0] for launch in submitted[:2])
    assert first != second or wrapper._levels[0]._plan_ptr != wrapper._levels[1]._plan_ptr
