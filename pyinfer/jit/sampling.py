"""Kernel factories of the sampling family."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u64
from pyinfer.jit.spec import JitModule, JitSpec

BLOCK = (1024, 1, 1)
PAIRED_BLOCK = (512, 1, 1)  # two on a multiprocessor of 9.0 and 10.0: one streams while the other searches
# A thread's room for candidates, of its own and aside (sampling/keep.cuh): 71 KB a block of 512, 69 a block of 1024; 25 for the histograms come on top.
_ROOM = {512: (20, 12), 1024: (10, 6)}
CLUSTER_BLOCK = (512, 1, 1)
CLUSTER = 8  # blocks a row
KEYS_PER_WARP = 1280  # 80 KB a block
MANY_KEYS_PER_WARP = 2304  # 144 KB a block: 262,144 tokens in a cluster of 8
DTYPES = ("float32", "bfloat16", "float16")
SOURCES = ("probs", "logits")
FILTERS = ("all", "min_p", "joint", "first")
"""What a sampler keeps: everything; p >= min_p * max; top_k and top_p on the given values; top_p on what top_k keeps, renormalised."""


def _ints(name: str) -> tuple[Field, ...]:
    return (
        ptr(name, "const void", "int32 or int64, or null: the value"),
        i32(f"{name}_wide", "1: int64"),
        i32(f"{name}_spread", "0: one for all, 1: one per output, 2: one per row"),
        i64(f"{name}_value"),
    )


def _floats(name: str) -> tuple[Field, ...]:
    return (ptr(name, "const float", "or null: the value"), i32(f"{name}_spread", "as above"), f32(f"{name}_value"))


_INPUT = (ptr("input", "const scalar_t", "[rows, vocab]"), i64("row_stride", "elements"))

SAMPLE = ParamStruct(
    "SampleParams",
    *_INPUT,
    i32("num_rows"),
    i32("vocab"),
    ptr("out", "int32_t", "[outputs] ids"),
    ptr("valid", "uint8_t", "[outputs] or null: 0 where the row cannot be sampled"),
    ptr("indices", "const void", "[outputs] rows, int32 or int64, or null: output i is row i"),
    i32("indices_wide"),
    *_ints("top_k"),
    *_floats("top_p"),
    *_floats("min_p"),
    ptr("seeds", "const void", "[outputs] int32 or int64, or null: seed"),
    i32("seeds_wide"),
    ptr("offsets", "const void", "[outputs] int32 or int64, or null: offset"),
    i32("offsets_wide"),
    u64("seed"),
    u64("offset"),
)
SAMPLE_CLUSTER = ParamStruct("SampleClusterParams", *SAMPLE.fields, i32("filter", "index in FILTERS"))
SOFTMAX = ParamStruct(
    "SoftmaxParams", *_INPUT, i32("vocab"), ptr("out", "float", "[rows, vocab]"), *_floats("temperature")
)
RENORM = ParamStruct(
    "RenormParams", *_INPUT, i32("vocab"), ptr("out", "float", "[rows, vocab]"), *_ints("top_k"), *_floats("top_p")
)
MASK = ParamStruct("MaskLogitsParams", *_INPUT, i32("vocab"), ptr("out", "float", "[rows, vocab]"), *_ints("top_k"))

CHAIN = ParamStruct(
    "ChainParams",
    ptr("draft", "const scalar_t", "[requests, drafts, vocab]"),
    i64("draft_stride_request", "elements"),
    i64("draft_stride_position"),
    ptr("target", "const scalar_t", "[requests, drafts + 1, vocab]"),
    i64("target_stride_request"),
    i64("target_stride_position"),
    ptr("draft_ids", "const void", "[requests, drafts] int32 or int64"),
    i32("draft_ids_wide"),
    i32("num_drafts"),
    i32("vocab"),
    ptr("out", "int32_t", "[requests, drafts + 1] ids"),
    ptr("accepted", "int32_t", "[requests]"),
    i32("add_accepted", "1: added to what is there"),
    ptr("emitted", "int32_t", "[requests]"),
    i32("add_emitted"),
    ptr("valid", "uint8_t", "[requests] or null"),
    ptr("seeds", "const void", "[requests] int32 or int64, or null: seed"),
    i32("seeds_wide"),
    ptr("offsets", "const void", "[requests] int32 or int64, or null: offset"),
    i32("offsets_wide"),
    u64("seed"),
    u64("offset"),
)


def _room(block: tuple[int, int, int]) -> tuple[tuple[tuple[str, int], ...], int]:
    """Constants of a kernel that searches for a filter's boundary, and its shared memory in bytes."""
    own, aside = _ROOM[block[0]]
    return (("own_slots", own), ("aside_slots", aside)), block[0] * (4 * (own + aside) + aside)


@functools.cache
def gen_sample(dtype: str, source: str = "probs", filter: str = "all", paired: bool = True) -> JitSpec:
    """A sampler over rows of `source` ("probs", "logits") of `dtype` under `filter` (one of FILTERS).

    paired: two blocks of 512 threads share a multiprocessor of 9.0 and 10.0; else one of 1024 has it, for calls that do not fill the GPU. Other
    architectures have shared memory for one block of 512, and no registers for one of 1024.
    """
    if source not in SOURCES or filter not in FILTERS:
        raise ValueError(
            f"gen_sample: no such kernel: got source={source!r}, filter={filter!r}, wanted one of {SOURCES} and one of {FILTERS}."
        )
    t = canonical_dtype(dtype)
    block = PAIRED_BLOCK if paired else BLOCK
    room, smem = _room(block) if filter in ("joint", "first") else ((), 0)
    return JitSpec(
        f"sample_{'' if paired else 'alone_'}{source}_{filter}_{t.short}",
        "sampling/sample.cu.jinja",
        SAMPLE,
        (("scalar_t", t.ctype), ("source", source), ("filter", filter), ("paired", paired), *room),
        block,
        smem=smem,
        min_arch=80 if paired else 90,
        max_arch=1 << 30 if paired else 119,
    )


def cluster_keys_per_warp(vocab: int, itemsize: int) -> int:
    """Keys that a warp of a cluster keeps of a row, wherever the row begins."""
    vec = 16 // itemsize
    warps = CLUSTER * (CLUSTER_BLOCK[0] // 32)
    vectors = -(-(vocab + vec - 1) // vec)
    run = -(-vectors // warps)
    return -(-run // 32) * 32 * vec


@functools.cache
def gen_sample_cluster(dtype: str, source: str, many_keys: bool = False) -> JitSpec:
    """The samplers of gen_sample, all filters in one kernel, a cluster of blocks per output; the row must fit (`cluster_keys_per_warp`)."""
    if source not in SOURCES:
        raise ValueError(f"gen_sample_cluster: no such kernel: got source={source!r}, wanted one of {SOURCES}.")
    t = canonical_dtype(dtype)
    keys = MANY_KEYS_PER_WARP if many_keys else KEYS_PER_WARP
    return JitSpec(
        f"sample_cluster_{source}_{'many_' if many_keys else ''}{t.short}",
        "sampling/sample_cluster.cu.jinja",
        SAMPLE_CLUSTER,
        (("scalar_t", t.ctype), ("source", source), ("cluster", CLUSTER)),
        CLUSTER_BLOCK,
        smem=CLUSTER_BLOCK[0] // 32 * keys * 4,
        min_arch=90,
        cluster=(CLUSTER, 1, 1),
    )


@functools.cache
def gen_softmax(dtype: str) -> JitSpec:
    """softmax(logits / temperature) to float32."""
    t = canonical_dtype(dtype)
    return JitSpec(f"softmax_{t.short}", "sampling/softmax.cu.jinja", SOFTMAX, (("scalar_t", t.ctype),), BLOCK)


@functools.cache
def gen_renorm(dtype: str) -> JitSpec:
    """top_k_renorm_probs and top_p_renorm_probs."""
    t = canonical_dtype(dtype)
    room, smem = _room(PAIRED_BLOCK)
    constants = (("scalar_t", t.ctype), ("paired", True), *room)
    return JitSpec(f"renorm_{t.short}", "sampling/renorm.cu.jinja", RENORM, constants, PAIRED_BLOCK, smem=smem)


@functools.cache
def gen_mask_logits(dtype: str) -> JitSpec:
    """top_k_mask_logits."""
    t = canonical_dtype(dtype)
    return JitSpec(f"mask_logits_{t.short}", "sampling/mask_logits.cu.jinja", MASK, (("scalar_t", t.ctype),), BLOCK)


@functools.cache
def gen_chain(dtype: str) -> JitSpec:
    """chain_speculative_sampling."""
    t = canonical_dtype(dtype)
    return JitSpec(f"chain_speculative_{t.short}", "sampling/chain.cu.jinja", CHAIN, (("scalar_t", t.ctype),), BLOCK)


@functools.cache
def all_specs() -> tuple[JitSpec, ...]:
    """Every kernel of the family."""
    specs = [
        gen_sample(d, s, f, paired)
        for d in DTYPES
        for s in SOURCES
        for f in FILTERS
        for paired in (False, True)
        if (s, f) != ("logits", "min_p")
    ]
    specs += [gen_sample_cluster(d, s, many) for d in DTYPES for s in SOURCES for many in (False, True)]
    return (*specs, *(g(d) for d in DTYPES for g in (gen_softmax, gen_renorm, gen_mask_logits, gen_chain)))


def gen_sampling_module() -> JitModule:
    """The whole family as one module."""
    return JitModule("sampling", all_specs())
