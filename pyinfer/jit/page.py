"""Specs of the kernels that keep a paged KV cache."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit.spec import JitModule, JitSpec

PLACES = (
    ptr("batch_indices", "const void", "[tokens]"),
    ptr("positions", "const void", "[tokens]"),
    ptr("kv_indices", "const void", "[num_indices] pages"),
    ptr("kv_indptr", "const void", "[batch + 1] into kv_indices"),
)
"""The index arrays by which `cuda_src/page/place.cuh` finds a token's place in a paged cache."""

_SCALES = (
    ptr("key_scale", "const float", "[1] or [num_heads], or null: key_scale_value"),
    ptr("value_scale", "const float"),
)
_SCALE_VALUES = (
    f32("key_scale_value"),
    f32("value_scale_value"),
    u32("key_scale_step", "0: one scale for all heads, 1: one a head"),
    u32("value_scale_step"),
)


def _tokens(name: str, rows: tuple[Field, ...], caches: tuple[Field, ...], scaled: bool) -> ParamStruct:
    """The struct of a kernel that goes over tokens: rows on one side, their places in a cache on the other."""
    unit = "elements" if scaled else "bytes"
    return ParamStruct(
        name,
        *rows,
        *caches,
        *PLACES,
        *(_SCALES if scaled else ()),
        *(i64(f"{t}_stride_{axis}", unit) for t in ("key", "value") for axis in ("n", "h")),
        *(i64(f"{t}_cache_stride_{axis}", unit) for t in ("key", "value") for axis in ("page", "slot", "head")),
        i64("num_indices"),
        i64("num_pages"),
        i32("batch"),
        u32("page_size"),
        u32("num_heads"),
        u32("parts", "blocks per token"),
        u32("tokens"),
        i32("wide", "bit per index array: int64"),
        *(_SCALE_VALUES if scaled else ()),
    )


@functools.cache
def append_params(quantize: bool) -> ParamStruct:
    """The parameter struct of append, moving bytes or rounding to 8-bit floats."""
    rows = (ptr("key", "const source_t", "[tokens, num_heads, key elements]"), ptr("value", "const source_t"))
    caches = (
        ptr("key_cache", "cache_t", "[pages, page_size, num_heads, key elements] in any order of axes"),
        ptr("value_cache", "cache_t"),
    )
    return _tokens("AppendQuantizeParams" if quantize else "AppendParams", rows, caches, quantize)


@functools.cache
def gather_params(dequantize: bool) -> ParamStruct:
    """The parameter struct of gather, moving bytes or from 8-bit floats."""
    rows = (ptr("key", "row_t", "[tokens, num_heads, key elements]"), ptr("value", "row_t"))
    caches = (
        ptr("key_cache", "const cache_t", "[pages, page_size, num_heads, key elements] in any order of axes"),
        ptr("value_cache", "const cache_t"),
    )
    return _tokens("GatherDequantizeParams" if dequantize else "GatherParams", rows, caches, dequantize)


COPY_PAGES = ParamStruct(
    "CopyPagesParams",
    ptr("source", "const uint8_t", "[pages, ...]"),
    ptr("target", "uint8_t", "[pages, ...]"),
    ptr("source_pages", "const void", "[pairs]"),
    ptr("target_pages", "const void", "[pairs]"),
    *(i64(f"{t}_{axis}", "bytes") for t in ("source", "target") for axis in ("stride_page", "outer", "inner")),
    i64("num_source_pages"),
    i64("num_target_pages"),
    u32("rows", "runs of bytes in a page"),
    u32("inner", ">= 1"),
    u32("chunks", "accesses in a run"),
    u32("parts", "blocks per pair"),
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

VECTOR_OFFSETS = ParamStruct(
    "VectorOffsetsParams",
    ptr("indices", "const int32_t", "[blocks]"),
    ptr("indptr", "const int32_t", "[batch + 1] into indices"),
    ptr("offsets", "int32_t", "[tokens]"),
    ptr("out_indptr", "const int32_t", "[batch + 1] into offsets"),
    ptr("kv_lens", "const int32_t", "[batch]"),
    i32("stride_block"),
    i32("stride_n"),
    i32("block_size"),
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


def append_config(chunks: int) -> tuple[int, int, int]:
    """(threads, chunks per thread, tokens per block) for a token of `chunks` accesses.

    256 threads hold it at four chunks each, or several blocks take parts of it.
    Measured on an H200 (tools/gpu/time_ops.py): four beat two and one from 1 to 16384 tokens, by up to 8%.
    """
    return _append_block(chunks, 1 if chunks <= 64 else 4, 1)


def _append_block(chunks: int, unroll: int, tokens: int) -> tuple[int, int, int]:
    threads = min(256, 32 * -(-chunks // (32 * unroll)))
    return threads, unroll, tokens if threads * unroll >= chunks and threads * tokens <= 256 else 1


def append_candidates(chunks: int) -> list[tuple[int, int, int]]:
    """Configurations worth timing, the default first (tools/gpu/time_ops.py)."""
    tried = [
        _append_block(chunks, unroll, tokens) for unroll, tokens in ((1, 1), (2, 1), (4, 1), (4, 4), (2, 2), (4, 8))
    ]
    return list(dict.fromkeys([append_config(chunks), *tried]))


@functools.cache
def gen_append(
    access_bytes: int,
    num_heads: int,
    key_chunks: int,
    value_chunks: int | None = None,
    config: tuple[int, int, int] | None = None,
    quantize: tuple[str, str] | None = None,
    load: str = "load_once",
) -> JitSpec:
    """The append kernel. It moves bytes, of any element type, or rounds to 8-bit floats.

    Parameters
    ----------
    access_bytes
        16, 8, 4, 2 or 1 (of what is read).
    num_heads
        Heads of keys and of values (decides the block's shape).
    key_chunks, value_chunks
        Accesses per head; values as keys by default.
    config
        One of `append_candidates`; default `append_config`.
    quantize
        Dtypes of what comes in and of the cache, if they differ.
    load
        Access function of `cuda_src/common/vec_io.cuh`.
    """
    value_chunks = key_chunks if value_chunks is None else value_chunks
    block, unroll, tokens = config or append_config(num_heads * max(key_chunks, value_chunks))
    source, cache, vec, kind = _types(access_bytes, quantize)
    constants = (
        ("source_t", source), ("cache_t", cache), ("VEC", vec), ("QUANTIZE", bool(quantize)), ("BLOCK", block), ("UNROLL", unroll),
        ("TOKENS", tokens), ("KEY_CHUNKS", key_chunks), ("VALUE_CHUNKS", value_chunks), ("LOAD", load),
    )  # fmt: skip
    several = (f"_n{tokens}" if tokens > 1 else "") + (
        "" if load == "load_once" else "_read" + load.removeprefix("load")
    )
    return JitSpec(
        f"append_paged_kv_cache{kind}_v{access_bytes}_{key_chunks}_{value_chunks}_t{block}_u{unroll}{several}",
        "page/append.cu.jinja",
        append_params(bool(quantize)),
        constants,
        block=(block, tokens, 1),
    )


def _types(access_bytes: int, dtypes: tuple[str, str] | None) -> tuple[str, str, int, str]:
    """C++ types on both sides, elements per access (of `access_bytes` on the rows' side), a part of the kernel's name."""
    if dtypes is None:
        return "uint8_t", "uint8_t", access_bytes, ""
    rows, cache = canonical_dtype(dtypes[0]), canonical_dtype(dtypes[1])
    return rows.ctype, cache.ctype, access_bytes // rows.itemsize, f"_{rows.short}_{cache.short}"


@functools.cache
def gen_gather(
    access_bytes: int,
    num_heads: int,
    key_chunks: int,
    value_chunks: int,
    dequantize: tuple[str, str] | None = None,
) -> JitSpec:
    """The gather kernel; parameters as `gen_append` (`dequantize`: dtypes of what comes out and of the cache)."""
    block, unroll, _ = append_config(num_heads * max(key_chunks, value_chunks))
    rows, cache, vec, kind = _types(access_bytes, dequantize)
    constants = (
        ("row_t", rows), ("cache_t", cache), ("VEC", vec), ("DEQUANTIZE", bool(dequantize)), ("BLOCK", block), ("UNROLL", unroll),
        ("KEY_CHUNKS", key_chunks), ("VALUE_CHUNKS", value_chunks),
    )  # fmt: skip
    return JitSpec(
        f"gather_paged_kv_cache{kind}_v{access_bytes}_{key_chunks}_{value_chunks}_t{block}_u{unroll}",
        "page/gather.cu.jinja",
        gather_params(bool(dequantize)),
        constants,
        block=(block, 1, 1),
    )


COPY_BLOCK, COPY_UNROLL = 256, 4


@functools.cache
def gen_copy_pages(access_bytes: int) -> JitSpec:
    """The kernel that copies whole pages."""
    constants = (("BYTES", access_bytes), ("BLOCK", COPY_BLOCK), ("UNROLL", COPY_UNROLL))
    name = f"copy_pages_v{access_bytes}"
    return JitSpec(name, "page/copy_pages.cu.jinja", COPY_PAGES, constants, block=(COPY_BLOCK, 1, 1))


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


@functools.cache
def gen_vector_offsets() -> JitSpec:
    """The kernel of block_sparse_indices_to_vector_sparse_offsets."""
    template = "page/vector_offsets.cu.jinja"
    return JitSpec("vector_offsets", template, VECTOR_OFFSETS, (("BLOCK", 256),), block=(256, 1, 1))


# (heads, chunks of 16 bytes per head): SmolLM2's 3 heads of 64, Llama 3 8B's 8 of 128, in two-byte elements.
_SHAPES = ((3, 8), (8, 16))


@functools.cache
def gen_page_module() -> JitModule:
    """The kernels of the usual shapes."""
    return JitModule(
        "page", (*(gen_append(16, *s) for s in _SHAPES), gen_batch_positions(), gen_seq_lens(), gen_vector_offsets())
    )


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
        gen_append(16, 8, 16, load="load"),
        gen_append(16, 8, 16, quantize=("bfloat16", "float8_e4m3fn")),
        gen_append(16, 1, 64, 8, quantize=("float16", "float8_e5m2")),
        gen_append(2, 3, 100, quantize=("bfloat16", "float8_e4m3fn")),
        gen_append(16, 2, 16, quantize=("float32", "float8_e4m3fn")),
        gen_gather(16, 8, 16, 16),
        gen_gather(16, 1, 64, 8),
        gen_gather(1, 2, 3, 100),
        gen_gather(16, 8, 16, 16, dequantize=("bfloat16", "float8_e4m3fn")),
        gen_gather(2, 3, 7, 9, dequantize=("float16", "float8_e5m2")),
        *(gen_copy_pages(b) for b in (16, 8, 4, 2, 1)),
    ]
