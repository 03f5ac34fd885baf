"""Kernel factory of top-k selection."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import ParamStruct, i32, i64, ptr
from pyinfer.jit.spec import JitModule, JitSpec

BLOCK = (1024, 1, 1)
MOST_SORTED = 4096
"""The largest k whose results are sorted in shared memory (32 KB)."""
DTYPES = ("float32", "bfloat16", "float16")

TOP_K = ParamStruct(
    "TopKParams",
    ptr("input", "const scalar_t", "[rows, max_len]"),
    i64("row_stride", "elements"),
    i32("max_len"),
    i32("k"),
    i32("tie_large", "1: of equal values on the boundary, those of highest index"),
    ptr("lengths", "const int32_t", "[rows / next_n] or null: max_len"),
    i32("next_n", "rows of a request, one behind the other in time"),
    i32("compress_ratio", "tokens of an element"),
    ptr("out_values", "scalar_t", "[rows, k] or null"),
    ptr("out_indices", "index_t", "[rows, k]"),
    ptr("page_table", "const int32_t", "[batch, ...] or null: what indices are replaced by"),
    i64("page_table_stride", "elements"),
    ptr("row_to_batch", "const int32_t", "[rows] or null: the row itself"),
    ptr("offsets", "const int32_t", "[rows] or null: what is added to indices"),
)


@functools.cache
def gen_top_k(dtype: str, sorted: bool = False, wide: bool = False) -> JitSpec:
    """Top-k of rows of `dtype`; `wide`: int64 indices."""
    t = canonical_dtype(dtype)
    constants = (
        ("scalar_t", t.ctype),
        ("index_t", "int64_t" if wide else "int32_t"),
        ("sorted", sorted),
        ("most_sorted", MOST_SORTED),
    )
    name = f"top_k_{'sorted_' if sorted else ''}{t.short}{'_i64' if wide else ''}"
    return JitSpec(name, "topk/top_k.cu.jinja", TOP_K, constants, BLOCK)


@functools.cache
def all_specs() -> tuple[JitSpec, ...]:
    """Every kernel of the family."""
    forms = ((False, True), (True, True), (False, False))
    return tuple(gen_top_k(d, *form) for d in DTYPES for form in forms)


def gen_topk_module() -> JitModule:
    """The whole family as one module."""
    return JitModule("topk", all_specs())
