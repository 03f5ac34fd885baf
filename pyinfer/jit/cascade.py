"""Specs of the kernels that merge attention states."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit.spec import JitModule, JitSpec

THREADS = 128

MERGE_STATE = ParamStruct(
    "MergeStateParams",
    ptr("v_a", "const scalar_t", "[tokens, heads, head_dim]"),
    ptr("s_a", "const float", "[tokens, heads], base 2"),
    ptr("v_b", "const scalar_t", "as v_a"),
    ptr("s_b", "const float", "as s_a"),
    ptr("v_out", "scalar_t", "as v_a; may be v_a"),
    ptr("s_out", "float", "as s_a; may be s_a"),
    ptr("mask", "const uint8_t", "[tokens], 0: leave the row alone; null: all rows"),
    i64("v_a_token", "strides in elements"),
    i64("v_a_head"),
    i64("s_a_token"),
    i64("s_a_head"),
    i64("v_b_token"),
    i64("v_b_head"),
    i64("s_b_token"),
    i64("s_b_head"),
    i64("out_token"),
    i64("out_head"),
    i64("s_out_token"),
    i64("s_out_head"),
    u32("rows", "tokens * heads"),
    u32("heads"),
    i32("head_dim", "a multiple of VEC"),
)

MERGE_STATES = ParamStruct(
    "MergeStatesParams",
    ptr("v", "const scalar_t", "[tokens, num_states, heads, head_dim]"),
    ptr("s", "const float", "[tokens, num_states, heads], base 2"),
    ptr("v_out", "scalar_t", "[tokens, heads, head_dim]"),
    ptr("s_out", "float", "[tokens, heads]"),
    i64("v_token", "strides in elements"),
    i64("v_state"),
    i64("v_head"),
    i64("s_token"),
    i64("s_state"),
    i64("s_head"),
    i64("out_token"),
    i64("out_head"),
    i64("s_out_token"),
    i64("s_out_head"),
    u32("rows", "tokens * heads"),
    u32("heads"),
    i32("head_dim", "a multiple of VEC"),
    i32("num_states"),
)

MERGE_LEVELS = ParamStruct(
    "MergeLevelsParams",
    ptr("plan_header", "const int32_t", "level 0's plan"),
    ptr("work", "const int32_t", "its work items"),
    ptr("qo_indptr", "const int32_t", "its requests' first query tokens"),
    ptr("partial_o", "const float", "its splits, [slots, num_kv_heads, tile_q, head_dim]; null: merged"),
    ptr("partial_lse", "const float", "[slots, num_kv_heads, tile_q], base 2"),
    ptr("v", "const scalar_t", "[levels, tokens, heads, head_dim]; of level 0 what is not in partial_o"),
    ptr("s", "const float", "[levels, tokens, heads], base 2"),
    ptr("out", "scalar_t", "[tokens, heads, head_dim]"),
    ptr("lse", "float", "[tokens, heads]; null: not wanted"),
    i64("v_level", "strides in elements"),
    i64("s_level"),
    i64("out_token"),
    i64("out_head"),
    i64("lse_token"),
    i64("lse_head"),
    i32("levels"),
    i32("num_kv_heads"),
    i32("group"),
    i32("tile_q"),
    f32("v_scale", "of the splits; the levels' results have it"),
)
MERGE_LEVELS_THREADS = 256


def row_lanes(head_dim: int, vec: int) -> int:
    """Threads that share a row: as many as it has vectors, rounded up to a power of two, at most a warp."""
    return min(32, 1 << (-(-head_dim // vec) - 1).bit_length())


def _spec(op: str, params: ParamStruct, dtype: DType, head_dim: int, vec: int | None) -> JitSpec:
    vec = vec or min(16 // dtype.itemsize, head_dim & -head_dim)
    lanes = row_lanes(head_dim, vec)
    rows = THREADS // lanes
    return JitSpec(
        f"{op}_{dtype.short}_v{vec}_{lanes}x{rows}",
        f"cascade/{op}.cu.jinja",
        params,
        (("scalar_t", dtype.ctype), ("VEC", vec), ("LANES", lanes), ("ROWS", rows)),
        block=(THREADS, 1, 1),
    )


@functools.cache
def gen_merge_state(dtype: DType | str, head_dim: int, vec: int | None = None) -> JitSpec:
    """The kernel that merges two states, in place or not.

    Parameters
    ----------
    dtype
        "float16", "bfloat16" or "float32".
    head_dim
        Decides how many threads share a row.
    vec
        Elements per access; default: what head_dim allows if pointers and strides are multiples of 16 bytes.
    """
    return _spec("merge_state", MERGE_STATE, canonical_dtype(dtype), head_dim, vec)


@functools.cache
def gen_merge_states(dtype: DType | str, head_dim: int, vec: int | None = None) -> JitSpec:
    """The kernel that merges any number of states; parameters as `gen_merge_state`."""
    return _spec("merge_states", MERGE_STATES, canonical_dtype(dtype), head_dim, vec)


@functools.cache
def gen_merge_levels(dtype: DType | str, head_dim: int, aligned: bool = True) -> JitSpec:
    """The kernel that ends a cascade.

    Parameters
    ----------
    dtype
        "float16" or "bfloat16".
    head_dim
        A multiple of 4.
    aligned
        Whether address and strides of the output are multiples of 4 elements.
    """
    dt = canonical_dtype(dtype)
    constants = (
        ("scalar_t", dt.ctype),
        ("HEAD_DIM", head_dim),
        ("THREADS", MERGE_LEVELS_THREADS),
        ("ALIGNED", aligned),
    )
    return JitSpec(
        f"merge_levels_{dt.short}_d{head_dim}" + "_unaligned" * (not aligned),
        "cascade/merge_levels.cu.jinja",
        MERGE_LEVELS,
        constants,
        block=(MERGE_LEVELS_THREADS, 1, 1),
    )


@functools.cache
def gen_cascade_module() -> JitModule:
    """All kernels for the usual head dimensions in float16 and bfloat16."""
    return JitModule(
        "cascade",
        tuple(
            gen(dtype, dim)
            for gen in (gen_merge_state, gen_merge_states, gen_merge_levels)
            for dtype in ("float16", "bfloat16")
            for dim in (64, 128, 256)
        ),
    )


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    specs = list(gen_cascade_module().specs)
    for gen in (gen_merge_state, gen_merge_states):
        specs += [gen("float32", 128), gen("float16", 80, 2), gen("bfloat16", 3, 1)]
    specs.append(gen_merge_levels("float16", 80, False))
    return list(dict.fromkeys(specs))
