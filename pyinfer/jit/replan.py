"""The kernel that schedules a decode batch on the device (`BatchDecodeWithPagedKVCacheWrapper.replan`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pyinfer.core.errors import fail
from pyinfer.core.params import ParamStruct, i32, ptr, u32
from pyinfer.jit.spec import JitSpec

if TYPE_CHECKING:
    from pyinfer.schedulers.plan import AttentionPlan

REPLAN = ParamStruct(
    "ReplanParams",
    ptr("plan", "int32_t", "the plan's buffer: header first"),
    ptr("kv_indptr", "const int32_t", "[batch + 1], pages"),
    ptr("last_page_len", "const int32_t", "[batch]; not read if kv_len is there"),
    ptr("kv_len", "const int32_t", "[batch] tokens, or null"),
    i32("at_work", "sections of the plan, in int32"),
    i32("at_kv_indptr"),
    i32("at_kv_len"),
    i32("max_work", "items that the work section holds; 0: no list is wanted"),
    i32("batch"),
    i32("max_pages", "entries of the page index buffer"),
    i32("page_size"),
    i32("rows", "packed rows of a request: query heads per kv head"),
    i32("tile_q"),
    i32("unit", "splits are multiples of this many keys"),
    u32("unit_magic", "division by unit: fast_divide"),
    i32("unit_shift"),
    i32("slots", "items that run at a time"),
    i32("extra_items", "items that splitting may add"),
    i32("window_left", "-1: none"),
    i32("chunk", "< 0: chosen, 0: never split, > 0: exactly this many keys"),
)

ITEM_COST, MERGE_COST = 64, 8  # of schedulers/_kernels.py: reading them there would import Numba
BLOCK = 1024
MAX_ITEMS = 2048
"""Work items (and requests) of the largest plan that the kernel can make: its shared memory holds them all."""
SIZES = (512, MAX_ITEMS)


@functools.cache
def gen_replan(max_items: int) -> JitSpec:
    """The spec for plans of at most `max_items` items, one of `SIZES`."""
    smem = max_items * (6 + 2) * 4 + 60 * 24 + BLOCK // 32 * 4
    constants = (("MAX_ITEMS", max_items), ("ITEM_COST", ITEM_COST), ("MERGE_COST", MERGE_COST), ("smem", smem))
    return JitSpec(
        f"decode_replan_{max_items}", "decode/replan.cu.jinja", REPLAN, constants, block=(BLOCK, 1, 1), smem=smem
    )


def replan_spec(op: str, plan: AttentionPlan) -> JitSpec:
    """The spec for a plan's capacity; ValueError if that is too large."""
    assert plan.capacity is not None
    most = max(plan.capacity.max_work, plan.capacity.max_batch)
    for size in SIZES:
        if most <= size:
            return gen_replan(size)
    fail(
        op, "plan's capacity", "is too large to be scheduled on the device", f"{most} work items", f"at most {MAX_ITEMS}",
        "Call plan() instead.",
    )  # fmt: skip


def replan_values(
    plan: AttentionPlan,
    plan_ptr: int,
    kv_indptr: int,
    last_page_len: int,
    kv_len: int,
    max_pages: int,
    listed: bool = True,
) -> tuple[int, ...]:
    """The parameters: addresses of the device (kv_len 0: none), the size of the page index buffer, and whether the work list is to be written."""
    at, capacity = plan.offsets, plan.capacity
    assert capacity is not None
    from pyinfer.jit.attention_launch import divisor

    page_size, group, tile_q, tile_kv, slots, extra, _, window_left, chunk = plan.shape.numbers[:9].tolist()
    sections = (at.work, at.kv_indptr, at.kv_len, capacity.max_work if listed else 0, capacity.max_batch, max_pages)
    cuts = (page_size, group, tile_q, tile_kv, *divisor(tile_kv), slots, extra, window_left, chunk)
    return (plan_ptr, kv_indptr, last_page_len, kv_len, *sections, *cuts)


def all_specs() -> list[JitSpec]:
    """Both sizes."""
    return [gen_replan(size) for size in SIZES]
