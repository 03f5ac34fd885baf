"""Decode and prefill attention kernels of the sm80 family: parameter structs, specs and factories.

One kernel per phase. Tiles and shared memory are in `jit/attention_config.py`, the launch functions in `jit/attention_launch.py`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import INT32, DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type
from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u32, u64_array
from pyinfer.jit import env
from pyinfer.jit.attention_config import (  # most callers know them from here
    DECODE_ROWS,
    DTYPES,
    HEAD_DIMS,
    OUT_DTYPES,
    ROW_CLASSES,
    AttentionConfig,
    attention_config,
    candidate_configs,
    cluster_configs,
    smem_limits,
    wide_decode_config,
)
from pyinfer.jit.attention_options import PLAIN, AttentionOptions
from pyinfer.jit.spec import JitModule, JitSpec

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "DECODE_ROWS",
    "DTYPES",
    "HEAD_DIMS",
    "ROW_CLASSES",
    "AttentionConfig",
    "all_specs",
    "attention_config",
    "attention_params",
    "candidate_configs",
    "gen_attention",
    "gen_batch_decode_module",
    "gen_batch_prefill_module",
    "gen_single_decode_module",
    "gen_single_prefill_module",
    "planned_decode_specs",
    "smem_limits",
]

# ---- parameters ------------------------------------------------------------------------------------------------------------------
# What changes from run to run stands first, then what the work source needs, so that a launch is run values + constants.
_RUN_FIELDS = (
    ptr("q", "const scalar_t", "[tokens, num_qo_heads, head_dim_qk]"),
    ptr("k", "const kv_t", "pages or tokens, by the strides"),
    ptr("v", "const kv_t"),
    ptr("out", "out_t", "[tokens, num_qo_heads, head_dim_vo]"),
    ptr("lse", "float", "[tokens, num_qo_heads], base 2, or null"),
    ptr("kv_indices", "const int32_t", "page ids; null: ragged"),
    ptr("partial_o", "float", "[max_partials, num_kv_heads, TILE_Q, head_dim_vo]"),
    ptr("partial_lse", "float", "[max_partials, num_kv_heads, TILE_Q], base 2"),
    ptr("semaphore", "int32_t", "[max_partials or (single) tiles, num_kv_heads], zero between launches"),
    i64("q_stride_token", "strides in elements"),
    i64("q_stride_head"),
    i64("out_stride_token"),
    i64("out_stride_head"),
    i64("k_stride_page"),
    i64("k_stride_token"),
    i64("k_stride_head"),
    i64("v_stride_page"),
    i64("v_stride_token"),
    i64("v_stride_head"),
)
_SCALE_FIELDS = (
    f32("logit_scale", "sm_scale * log2(e); soft cap: 2 log2(e) sm_scale / cap"),
    f32("soft_cap_log2", "cap * log2(e)"),
    f32("v_scale", "multiplies the output"),
)
SHAPE_FIELDS = (
    i32("num_kv_heads"),
    i32("group", "query heads per kv head"),
    u32("group_magic", "division by group: fast_divide"),
    i32("group_shift"),
    i32("causal"),
    i32("window_left", "keys to the left that stay visible; -1: all"),
    i32("page_size"),
    u32("page_magic", "division by page_size: fast_divide"),
    i32("page_shift"),
)
SOURCE_FIELDS = {
    "plan": (
        ptr("plan_header", "const int32_t", "word 0: number of work items"),
        ptr("work", "const int32_t", "[n_work, 8]"),
        ptr("qo_indptr", "const int32_t", "[batch + 1], tokens"),
        ptr("kv_indptr", "const int32_t", "[batch + 1], pages or (ragged) tokens"),
        ptr("kv_len", "const int32_t", "[batch], tokens"),
        i32("num_indices", "entries of kv_indices that may be fetched ahead"),
    ),
    "single": (
        i32("qo_len"),
        i32("kv_len"),
        i32("kv_chunk", "keys per split"),
        i32("num_splits"),
    ),
}
SOURCES = tuple(SOURCE_FIELDS)
"""Where work items come from: a plan's list, or arithmetic on one request's lengths."""
EVEN_TABLE = 72
"""Words of the table that travels with a launch of source "even"."""
_EVEN_FIELDS = {
    "even": (i32("len_at", "word of the table where kv_len begins"),),
    "even_plan": (
        ptr("plan_header", "const int32_t", "word 2: number of requests"),
        ptr("kv_indptr", "const int32_t", "[batch + 1], pages or (ragged) tokens"),
        ptr("kv_len", "const int32_t", "[batch], tokens"),
    ),
}
"""Of decode alone, for few requests of one token that are cut evenly: kv_indptr and kv_len by value, or in the plan on the device."""


def option_fields(options: AttentionOptions) -> tuple[Field, ...]:
    """The run-time fields that options add, behind the scales, in this order; `attention_launch` fills them."""
    found: list[Field] = []
    if options.mask:
        found.append(ptr("mask", "const uint8_t", "bits, [qo_len, kv_len] per request"))
        found.append(ptr("mask_indptr", "const int32_t", "[batch + 1], bytes; null: one request"))
    if options.multi_item:
        found.append(ptr("prefix_len", "const uint32_t", "[batch]"))
        found.append(ptr("token_pos", "const uint16_t", "[batch, token_pos_len]: place within its item"))
        found.append(i32("token_pos_len"))
    if options.sinks:
        found.append(ptr("sinks", "const float", "[num_qo_heads], natural-log logits"))
    if options.user is not None:
        found.extend(options.user.fields)
    return tuple(found)


@functools.cache
def attention_params(source: str, options: AttentionOptions = PLAIN, head_dim_qk: int = 0) -> ParamStruct:
    """The parameter struct of a kernel. Tables travel by value, behind the strides: RoPE's frequencies, and with source "even" the page ranges."""
    tables: tuple[Field, ...] = ()
    if options.rope:
        tables = (u64_array("rope_frequency", head_dim_qk // 2, "turns per position, times 2^64"),)
    if source == "even":
        tables += (u64_array("table", EVEN_TABLE // 2, "int32 pairs: kv_indptr, from len_at on kv_len"),)
    of_source = {**SOURCE_FIELDS, **_EVEN_FIELDS}[source]
    fields = (*_RUN_FIELDS, *tables, *_SCALE_FIELDS, *option_fields(options), *SHAPE_FIELDS, *of_source)
    names = {"plan": "Planned", "single": "Single", "even": "Even", "even_plan": "EvenPlanned"}
    return ParamStruct(f"{names[source]}AttentionParams", *fields)


PLAN_PARAMS = attention_params("plan")
SINGLE_PARAMS = attention_params("single")

VARIANTS = {"plain": False, "softcap": True}
"""Whether logits are soft-capped."""

# In the order of attention_feature in common/attention_variant.cuh: feature i is bit i.
_FEATURES = (
    "softcap", "alibi", "mask", "items", "sinks", "user_logits", "user_mask", "user_output", "user_query", "no_softmax", "user_raw",
)  # fmt: skip


def _features(soft_cap: bool, options: AttentionOptions) -> tuple[int, str]:
    """FEATURES of the kernel's variant, and their name."""
    user = [False] * 6
    if options.user is not None:
        user = [hook in options.user.hooks for hook in ("logits", "mask", "output", "query")]
        user += [not options.user.softmax, options.user.raw_scores]
    on = (soft_cap, options.alibi, options.mask, options.multi_item, options.sinks, *user)
    names = [name for name, wanted in zip(_FEATURES[:5], on, strict=False) if wanted]
    if options.rope is not None:
        names.append("rope")
    if options.user is not None:
        names.append(f"user_{options.user.name}")
    return sum(1 << i for i, wanted in enumerate(on) if wanted), "_".join(names) or "plain"


@functools.cache
def gen_attention(
    config: AttentionConfig,
    dtype: DType | str,
    head_dim_qk: int,
    head_dim_vo: int,
    source: str = "plan",
    variant: str = "plain",
    kv_dtype: DType | str | None = None,
    out_dtype: DType | str | None = None,
    options: AttentionOptions = PLAIN,
    aligned: bool = True,
) -> JitSpec:
    """The spec of one attention kernel.

    Parameters
    ----------
    config
        From `attention_config` or `candidate_configs`, for the same kv_dtype and options.
    dtype
        float16 or bfloat16: of the queries.
    source
        "plan": work items come from an AttentionPlan; "single": from arithmetic on one request's lengths; "even" and "even_plan"
        (decode): from page ranges and lengths that travel with the launch, or that the plan holds.
    variant
        "plain" or "softcap".
    kv_dtype
        Of keys and values: dtype, float8_e4m3fn or float8_e5m2.
    out_dtype
        float16, bfloat16 or float32; None: dtype.
    options
        Everything else that changes the kernel. The values of RoPE's scale and theta do not: they are parameters.
    aligned
        Whether all addresses and strides are multiples of 16 bytes; if not, copies go element by element.
    """
    dt = canonical_dtype(dtype)
    kv = dt if kv_dtype is None else canonical_dtype(kv_dtype)
    out = dt if out_dtype is None else canonical_dtype(out_dtype)
    if out not in OUT_DTYPES:
        fail_type("attention", "out_dtype", "has no CUDA kernel", out, "float16, bfloat16 or float32")
    features, name = _features(VARIANTS[variant], options)
    constants: dict[str, Any] = {
        "scalar_t": dt.ctype,
        "kv_t": kv.ctype,
        "out_t": out.ctype,
        "HEAD_DIM_QK": head_dim_qk,
        "HEAD_DIM_VO": head_dim_vo,
        "TILE_KV": config.tile_kv,
        "WARPS": config.num_warps,
        "CTAS_PER_SM": config.ctas_per_sm,
        "STAGES": config.stages,
        "Q_IN_REGISTERS": config.q_in_registers,
        "smem": config.smem,
        "source": source,
        "FEATURES": features,
        "ROPE": options.rope is not None,
        "QUERY": options.user is not None and "query" in options.user.hooks,
        "ALIGNED": aligned,
        "user_variant_source": options.user.source if options.user is not None else "",
    }
    if config.kind == "prefill":
        constants["TILE_Q"] = config.tile_q
    else:
        constants["CLUSTER"] = config.cluster
    dims = f"d{head_dim_qk}" if head_dim_qk == head_dim_vo else f"d{head_dim_qk}x{head_dim_vo}"
    types = dt.short + (f"_kv{kv.short}" if kv is not dt else "") + (f"_o{out.short}" if out is not dt else "")
    return JitSpec(
        name=f"{config.kind}_sm80_{types}_{dims}_{source}_{name}_{config.tag}{'' if aligned else '_unaligned'}",
        template=f"{config.kind}/{config.kind}_sm80.cu.jinja",
        params=attention_params(source, options, head_dim_qk),
        constants=tuple(constants.items()),
        block=config.block,
        smem=config.smem,
        min_arch=90 if config.cluster > 1 else 80,
        cluster=(config.cluster, 1, 1) if config.cluster > 1 else None,
        link=options.user.functions if options.user is not None else (),
    )


def planned_decode_specs(
    arch: int, dtype: DType | str, head_dim_qk: int, head_dim_vo: int, variant: str = "plain", kv_dtype: DType | str | None = None,
    out_dtype: DType | str | None = None, options: AttentionOptions = PLAIN,
) -> list[JitSpec]:  # fmt: skip
    """Every kernel that a decode plan may be run by: of its list or cut evenly, of a full device, one block a multiprocessor, and clusters."""
    kv = canonical_dtype(dtype if kv_dtype is None else kv_dtype)
    base = attention_config(arch, dtype, head_dim_qk, head_dim_vo, DECODE_ROWS, kv, options)
    wide = wide_decode_config(arch, head_dim_qk, head_dim_vo, kv.itemsize, options)
    made = [(config, source) for config in (base, wide) if config is not None for source in ("plan", "even")]
    for cluster in cluster_configs(arch, head_dim_qk, head_dim_vo, kv.itemsize, options):
        made += [(cluster, "even"), (cluster, "even_plan")]
    dims = head_dim_qk, head_dim_vo
    return [gen_attention(c, dtype, *dims, s, variant, kv, out_dtype, options) for c, s in made]


OPTION_CASES = (
    # head_dim_qk, head_dim_vo, queries, keys and values, output, soft cap, options, aligned
    (128, 128, "bfloat16", "float8_e4m3fn", None, False, PLAIN, True),
    (128, 128, "float16", "float8_e5m2", None, False, PLAIN, True),
    (64, 64, "float16", "float8_e4m3fn", None, False, AttentionOptions(sinks=True), True),
    (256, 256, "bfloat16", "float8_e4m3fn", "float32", True, AttentionOptions(alibi=True), True),
    (128, 128, "bfloat16", "float8_e4m3fn", None, False, AttentionOptions(rope=(1.0, 1e4)), True),
    (128, 128, "bfloat16", None, None, False, AttentionOptions(rope=(1.0, 1e4)), True),
    (64, 64, "float16", None, None, True, AttentionOptions(alibi=True, mask=True, multi_item=True, sinks=True), True),
    (128, 128, "bfloat16", None, None, False, AttentionOptions(mask=True), True),
    (256, 256, "float16", None, None, False, AttentionOptions(mask=True, rope=(1.0, 1e4)), True),
    (192, 128, "bfloat16", None, None, False, PLAIN, True),
    (72, 200, "float16", "float8_e5m2", "bfloat16", False, AttentionOptions(sinks=True), False),
    (40, 40, "float16", None, "float32", False, PLAIN, False),
)
"""Each option at least once, and together where it costs most; kernels with options are otherwise compiled when asked for."""


def option_specs(arch: int) -> list[JitSpec]:
    """The specs of `OPTION_CASES`: both phases, sources taking turns."""
    found: dict[JitSpec, None] = {}
    for i, (qk, vo, dtype, kv, out, cap, options, aligned) in enumerate(OPTION_CASES):
        for j, rows in enumerate((DECODE_ROWS, 128)):
            config = attention_config(arch, dtype, qk, vo, rows, kv, options)
            source, variant = SOURCES[(i + j) % 2], "softcap" if cap else "plain"
            found[gen_attention(config, dtype, qk, vo, source, variant, kv, out, options, aligned)] = None
    return list(found)


def all_specs(archs: Collection[int] = (80, 89, 90)) -> list[JitSpec]:
    """The specs worth building ahead for the given architectures: the usual dtypes, head dimensions, soft cap or not, and `option_specs`.

    The defaults stand for the three sizes of shared memory.
    """
    found: dict[JitSpec, None] = {}
    for arch in archs:
        for dim in HEAD_DIMS:
            for dtype in DTYPES:
                for rows in ROW_CLASSES:
                    config = attention_config(arch, dtype, dim, dim, rows)
                    for source in SOURCES:
                        for variant in VARIANTS:
                            found[gen_attention(config, dtype, dim, dim, source, variant)] = None
            for dtype in DTYPES:
                found |= dict.fromkeys(planned_decode_specs(arch, dtype, dim, dim))
    # Options once, cut for the smallest shared memory: that fits all of the architectures.
    found |= dict.fromkeys(option_specs(min(archs, key=smem_limits)))
    return list(found)


# ---- FlashInfer's factory names (API.md section 19), with its argument order -----------------------------------------------------
def _module(
    op: str, source: str, row_classes: tuple[int, ...], dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_sliding_window: bool, use_logits_soft_cap: bool, backend: str = "fa2",
) -> JitModule:  # fmt: skip
    dtype, kv, out = (
        canonical_dtype(d, op, arg) for arg, d in (("dtype_q", dtype_q), ("dtype_kv", dtype_kv), ("dtype_o", dtype_o))
    )
    if pos_encoding_mode not in (0, 1, 2):
        fail(
            op,
            "pos_encoding_mode",
            "is no positional encoding",
            pos_encoding_mode,
            "0 (NONE), 1 (ROPE_LLAMA) or 2 (ALIBI)",
        )
    options = AttentionOptions(alibi=pos_encoding_mode == 2, rope=(1.0, 1e4) if pos_encoding_mode == 1 else None)
    variant = "softcap" if use_logits_soft_cap else "plain"
    specs: dict[JitSpec, None] = {}
    for arch in env.default_archs():
        if backend != "fa2" and dtype is kv:
            from pyinfer.jit import attention_sm90

            family = options._replace(family="sm90" if backend == "fa3" else "")
            case = (env.arch_number(arch), dtype, head_dim_qk, head_dim_vo, source, variant, family)
            specs |= dict.fromkeys(attention_sm90.reachable_specs(*case, out))
        for rows in row_classes if backend != "fa3" else ():
            config = attention_config(env.arch_number(arch), dtype, head_dim_qk, head_dim_vo, rows, kv, options)
            spec = gen_attention(config, dtype, head_dim_qk, head_dim_vo, source, variant, kv, out, options)
            specs[spec] = None
        if source == "plan" and backend != "fa3":
            found = planned_decode_specs(
                env.arch_number(arch), dtype, head_dim_qk, head_dim_vo, variant, kv, out, options
            )
            specs |= dict.fromkeys(found)
    if not specs:
        fail(op, "backend", "has no kernel for this case", repr(backend), "'auto' or 'fa2'")
    phase = op.removeprefix("gen_").removesuffix("_module")
    name = _features(use_logits_soft_cap, options)[1]
    types = dtype.short if dtype is kv is out else f"{dtype.short}_{kv.short}_{out.short}"
    return JitModule(f"{phase}_{types}_d{head_dim_qk}x{head_dim_vo}_{name}", tuple(specs))


def gen_single_decode_module(
    dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, head_dim_qk: int, head_dim_vo: int, pos_encoding_mode: int = 0,
    use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of `single_decode_with_kv_cache` (at most 16 query heads a kv head). The window is a run-time value: the kernel is the same."""
    args = (
        dtype_q,
        dtype_kv,
        dtype_o,
        head_dim_qk,
        head_dim_vo,
        pos_encoding_mode,
        use_sliding_window,
        use_logits_soft_cap,
    )
    return _module("gen_single_decode_module", "single", (DECODE_ROWS,), *args)


def gen_batch_decode_module(
    dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, dtype_idx: DType | str, head_dim_qk: int, head_dim_vo: int, pos_encoding_mode: int = 0,
    use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of `BatchDecodeWithPagedKVCacheWrapper` (at most 16 query heads a kv head). `dtype_idx`: int32."""
    _check_index("gen_batch_decode_module", dtype_idx)
    args = (
        dtype_q,
        dtype_kv,
        dtype_o,
        head_dim_qk,
        head_dim_vo,
        pos_encoding_mode,
        use_sliding_window,
        use_logits_soft_cap,
    )
    return _module("gen_batch_decode_module", "plan", (DECODE_ROWS,), *args)


def gen_single_prefill_module(
    backend: str, dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, head_dim_qk: int, head_dim_vo: int, pos_encoding_mode: int = 0,
    use_sliding_window: bool = False, use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of `single_prefill_with_kv_cache`, one for each tile height. Scores are accumulated in float32 with use_fp16_qk_reduction too."""
    _check_backend("gen_single_prefill_module", backend, ("auto", "fa2", "fa3"))
    args = (
        dtype_q,
        dtype_kv,
        dtype_o,
        head_dim_qk,
        head_dim_vo,
        pos_encoding_mode,
        use_sliding_window,
        use_logits_soft_cap,
    )
    return _module("gen_single_prefill_module", "single", ROW_CLASSES, *args, backend)


def gen_batch_prefill_module(
    backend: str, dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, dtype_idx: DType | str, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of the batch prefill wrappers (paged and ragged are the same), one for each tile height. `dtype_idx`: int32."""
    _check_backend("gen_batch_prefill_module", backend, ("auto", "fa2", "fa3"))
    _check_index("gen_batch_prefill_module", dtype_idx)
    args = (
        dtype_q,
        dtype_kv,
        dtype_o,
        head_dim_qk,
        head_dim_vo,
        pos_encoding_mode,
        use_sliding_window,
        use_logits_soft_cap,
    )
    return _module("gen_batch_prefill_module", "plan", ROW_CLASSES, *args, backend)


def _check_backend(op: str, backend: str, there: tuple[str, ...] = ("auto", "fa2")) -> None:
    if backend not in there:
        wanted = ", ".join(map(repr, there[:-1])) + f" or {there[-1]!r}"
        fail(op, "backend", "is not available", repr(backend), wanted)


def _check_index(op: str, dtype_idx: DType | str) -> None:
    if canonical_dtype(dtype_idx, op, "dtype_idx") is not INT32:
        fail_type(op, "dtype_idx", "is not supported", dtype_idx, "int32")
