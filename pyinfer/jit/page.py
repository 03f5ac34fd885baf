"""Specs of the kernels that keep a paged KV cache."""

from __future__ import annotations

import functools

from pyinfer.core.params import ParamStruct, i32, i64, ptr, u32
from pyinfer.jit.spec import JitModule, JitSpec

APPEND = ParamStruct(
    "AppendParams",
    ptr("key", "const uint8_t", "[tokens, num_heads, key bytes]"),
    ptr("value", "const uint8_t", "[tokens, num_heads, value bytes]"),
    ptr("key_cache", "uint8_t", "[pages, page_size, num_heads, key bytes] in any order of axes"),
    ptr("value_cache", "uint8_t"),
    ptr("batch_indices", "const void", "[tokens]"),
    ptr("positions", "const void", "[tokens]"),
    ptr("kv_indices", "const void", "[num_indices] pages"),
    ptr("kv_indptr", "const void", "[batch + 1] into kv_indices"),
    *(i64(f"{t}_stride_{axis}", "bytes") for t in ("key", "value") for axis in ("n", "h")),
    *(i64(f"{t}_cache_stride_{axis}", "bytes") for t in ("key", "value") for axis in ("page", "slot", "head")),
    i64("num_indices"),
    i64("num_pages"),
    i32("batch"),
    u32("page_size"),
    i32("num_heads"),
    i32("parts", "blocks per token"),
    i32("wide", "bit per index array: int64"),
)

BATCH_POSITIONS = ParamStruct(
    "BatchPositionsParams",
    ptr("append_indptr", "const void", "[batch + 1]"),
    ptr("seq_lens", "const void", "[batch]"),
    ptr("batch_indices", "int32_t", "[nnz]"),
    ptr("positions", "int32_t", "[nnz]"),
    i64("nnz"),
    i32("batch"),
    i32("wide", "bit per array: int64"),
)

SEQ_LENS = ParamStruct(
    "SeqLensParams",
    ptr("kv_indptr", "const void", "[batch + 1]"),
    ptr("last_page_len", "const void", "[batch]"),
    ptr("seq_lens", "int32_t", "[batch]"),
    i64("page_size"),
    i32("batch"),
    i32("wide", "bit per array: int64"),
)


def append_config(chunks: int) -> tuple[int, int]:
    """(threads, chunks per thread) for a token of `chunks` accesses: one block if 256 threads can hold it, four chunks each.

    Measured on an H200 (tools/gpu/time_ops.py): four beat two and one from 1 to 16384 tokens, by up to 8%.
    """
    return _append_block(chunks, 1 if chunks <= 64 else 4)


def _append_block(chunks: int, unroll: int) -> tuple[int, int]:
    return min(256, 32 * -(-chunks // (32 * unroll))), unroll


def append_candidates(chunks: int) -> list[tuple[int, int]]:
    """Configurations worth timing, the default first (tools/gpu/time_ops.py)."""
    return list(dict.fromkeys([append_config(chunks), *(_append_block(chunks, unroll) for unroll in (1, 2, 4))]))


@functools.cache
def gen_append(
    access_bytes: int,
    num_heads: int,
    key_chunks: int,
    value_chunks: int | None = None,
    config: tuple[int, int] | None = None,
) -> JitSpec:
    """The append kernel. It moves bytes: any element type.

    Parameters
    ----------
    access_bytes
        16, 8, 4, 2 or 1.
    num_heads
        Heads of keys and of values (decides the block's shape).
    key_chunks, value_chunks
        Accesses per head; values as keys by default.
    config
        One of `append_candidates`; default `append_config`.
    """
    value_chunks = key_chunks if value_chunks is None else value_chunks
    block, unroll = config or append_config(num_heads * max(key_chunks, value_chunks))
    constants = (("BYTES", access_bytes), ("BLOCK", block), ("UNROLL", unroll), ("KEY_CHUNKS", key_chunks), ("VALUE_CHUNKS", value_chunks))  # fmt: skip
    return JitSpec(
        f"append_paged_kv_cache_v{access_bytes}_{key_chunks}_{value_chunks}_t{block}_u{unroll}",
        "page/append.cu.jinja",
        APPEND,
        constants,
        block=(block, 1, 1),
    )


@functools.cache
def gen_batch_positions() -> JitSpec:
    """The kernel of get_batch_indices_positions."""
    return JitSpec(
        "batch_indices_positions",
        "page/batch_positions.cu.jinja",
        BATCH_POSITIONS,
        (("BLOCK", 256),),
        block=(256, 1, 1),
    )


@functools.cache
def gen_seq_lens() -> JitSpec:
    """The kernel of get_seq_lens."""
    return JitSpec("seq_lens", "page/seq_lens.cu.jinja", SEQ_LENS, (("BLOCK", 128),), block=(128, 1, 1))


# (heads, chunks of 16 bytes per head): SmolLM2's 3 heads of 64, Llama 3 8B's 8 of 128, in two-byte elements.
_SHAPES = ((3, 8), (8, 16))


@functools.cache
def gen_page_module() -> JitModule:
    """The kernels of the usual shapes."""
    return JitModule("page", (*(gen_append(16, *s) for s in _SHAPES), gen_batch_positions(), gen_seq_lens()))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    return [
        *gen_page_module().specs,
        gen_append(16, 1, 64, 8),  # MLA: 512 and 64
        gen_append(16, 64, 16),
        gen_append(8, 4, 16),
        gen_append(4, 2, 33),
        gen_append(2, 1, 64),
        gen_append(1, 3, 100),
        *(gen_append(16, 8, 16, config=c) for c in append_candidates(128)),
    ]
