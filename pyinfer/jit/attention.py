"""Decode and prefill attention kernels of the sm80 family: configurations, parameter structs and specs.

One kernel per phase. The launch functions are in `jit/attention_launch.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT16, INT32, DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit import env
from pyinfer.jit.spec import JitModule, JitSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD_DIMS = (64, 128, 256)
DTYPES = (FLOAT16, BFLOAT16)
DECODE_ROWS = 16
"""Packed rows of a decode tile: one mma row block."""
ROW_CLASSES = (DECODE_ROWS, 64, 128)
"""Values of max_packed_rows that stand for all: each has its own configuration."""

# Shared memory that one block may have, and that all blocks of a multiprocessor share (bytes; each block costs 1 KiB more there). CUDA programming guide,
# "Technical specifications per compute capability". Not listed: the smallest.
_SMEM = {
    80: (163 << 10, 164 << 10),
    87: (163 << 10, 164 << 10),
    90: (227 << 10, 228 << 10),
    100: (227 << 10, 228 << 10),
    103: (227 << 10, 228 << 10),
}
_SMEM_SMALL = (99 << 10, 100 << 10)


def smem_limits(arch: int) -> tuple[int, int]:
    """Shared memory per block and per multiprocessor of an architecture (80, 89, 90, ...), in bytes."""
    return _SMEM.get(arch, _SMEM_SMALL)


@dataclass(frozen=True)
class AttentionConfig:
    """How one attention kernel is cut.

    Attributes
    ----------
    kind
        "decode" (16 packed rows, warps share out the keys) or "prefill" (warps share out the rows).
    tile_q
        Packed query rows of a tile: what the scheduler must use.
    tile_kv
        Keys a block takes at a time (decode: all warps together).
    num_warps
        Warps per block.
    ctas_per_sm
        Blocks that a multiprocessor holds at once; caps the registers at 65536 / threads.
    stages
        K and V tiles in the ring.
    smem
        Dynamic shared memory per block in bytes.
    q_in_registers
        Query fragments are kept in registers instead of being read from shared memory for every tile.
    """

    kind: str
    tile_q: int
    tile_kv: int
    num_warps: int
    ctas_per_sm: int
    stages: int
    smem: int
    q_in_registers: bool = False

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads per block."""
        return (32 * self.num_warps, 1, 1)

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        return f"q{self.tile_q}_kv{self.tile_kv}_w{self.num_warps}_c{self.ctas_per_sm}_s{self.stages}" + (
            "_qreg" if self.q_in_registers else ""
        )


def decode_config(
    head_dim_qk: int, head_dim_vo: int, *, tile_kv: int, num_warps: int, ctas_per_sm: int, stages: int
) -> AttentionConfig:
    """A decode configuration with its shared memory: rings of K and V (and, at head_dim 256, each warp's queries), which the merge of the warps overlays."""
    q_in_registers = head_dim_qk <= 128  # at 256 the queries would take 64 registers beside the output's 128
    ring = stages * tile_kv * (head_dim_qk + head_dim_vo) * 2 + (
        0 if q_in_registers else num_warps * DECODE_ROWS * head_dim_qk * 2
    )
    merge = 4 * (num_warps * DECODE_ROWS * (head_dim_vo + 8 + 2) + DECODE_ROWS)
    smem = -(-max(ring, merge) // 128) * 128
    return AttentionConfig("decode", DECODE_ROWS, tile_kv, num_warps, ctas_per_sm, stages, smem, q_in_registers)


def prefill_config(
    head_dim_qk: int,
    head_dim_vo: int,
    *,
    tile_q: int,
    tile_kv: int,
    num_warps: int,
    ctas_per_sm: int,
    stages: int = 2,
    q_in_registers: bool = False,
) -> AttentionConfig:
    """A prefill configuration with its shared memory: the queries, and rings of K and V."""
    smem = tile_q * head_dim_qk * 2 + stages * tile_kv * (head_dim_qk + head_dim_vo) * 2
    return AttentionConfig("prefill", tile_q, tile_kv, num_warps, ctas_per_sm, stages, smem, q_in_registers)


def candidate_configs(
    arch: int, head_dim_qk: int, head_dim_vo: int, max_packed_rows: int
) -> tuple[AttentionConfig, ...]:
    """The configurations worth timing for a case, the preferred one first; all of them fit the architecture.

    Parameters
    ----------
    arch
        Architecture number: 80, 89, 90, ...
    head_dim_qk, head_dim_vo
        Head dimensions.
    max_packed_rows
        Largest qo_len * group over the requests.
    """
    candidates = _decode_candidates if max_packed_rows <= DECODE_ROWS else _prefill_candidates
    found = candidates(head_dim_qk, head_dim_vo, max_packed_rows)
    found += [replace(c, ctas_per_sm=1) for c in found if c.ctas_per_sm > 1]
    per_block, per_sm = smem_limits(arch)
    fitting = [c for c in found if c.smem <= per_block and c.ctas_per_sm * (c.smem + 1024) <= per_sm]
    return tuple(dict.fromkeys(fitting))


def _decode_candidates(head_dim_qk: int, head_dim_vo: int, max_packed_rows: int) -> list[AttentionConfig]:
    # (tile_kv, warps, blocks per SM, stages). A warp's slab of tile_kv / warps keys is 8 KiB of K and V at head_dim 64 and 128, 16 KiB at 256.
    wide = max(head_dim_qk, head_dim_vo)
    if wide > 128:
        shapes = [(64, 4, 1, 3), (32, 2, 2, 3), (32, 2, 1, 3), (32, 2, 1, 2)]
    else:
        rows = 32 if wide == 64 else 16
        shapes = [
            (4 * rows, 4, 2, 3),
            (4 * rows, 4, 1, 4),
            (4 * rows, 4, 3, 2),
            (8 * rows, 8, 1, 3),
            (2 * rows, 2, 4, 3),
        ]
    return [
        decode_config(head_dim_qk, head_dim_vo, tile_kv=kv, num_warps=w, ctas_per_sm=c, stages=n)
        for kv, w, c, n in shapes
    ]


def _prefill_candidates(head_dim_qk: int, head_dim_vo: int, max_packed_rows: int) -> list[AttentionConfig]:
    # (tile_q, tile_kv, warps, blocks per SM, stages, queries in registers)
    wide = max(head_dim_qk, head_dim_vo)
    if max_packed_rows <= 64 and wide <= 128:
        shapes = [(64, 64, 4, 2, 2, True), (64, 64, 4, 3, 2, False), (64, 32, 4, 2, 3, True)]
    elif wide <= 64:
        shapes = [
            (128, 64, 4, 2, 2, True),
            (128, 64, 4, 2, 3, True),
            (128, 64, 4, 3, 2, False),
            (128, 32, 4, 3, 3, False),
        ]
    elif wide <= 128:
        shapes = [
            (128, 64, 4, 2, 2, False),
            (128, 32, 4, 2, 3, False),
            (128, 32, 4, 2, 2, False),
            (128, 64, 8, 1, 2, True),
        ]
    elif max_packed_rows <= 64:
        shapes = [(64, 32, 4, 2, 2, False), (64, 32, 4, 1, 2, False)]
    else:
        shapes = [(128, 64, 8, 1, 2, False), (64, 32, 4, 2, 2, False), (64, 32, 4, 1, 2, False)]
    return [
        prefill_config(
            head_dim_qk, head_dim_vo, tile_q=q, tile_kv=kv, num_warps=w, ctas_per_sm=c, stages=n, q_in_registers=r
        )
        for q, kv, w, c, n, r in shapes
    ]


@functools.cache
def attention_config(
    arch: int, dtype: DType | str, head_dim_qk: int, head_dim_vo: int, max_packed_rows: int
) -> AttentionConfig:
    """The configuration for a case.

    Parameters
    ----------
    arch
        Architecture number the code is built for (`core.device.arch_number_of`): 80, 89, 90, ...
    dtype
        float16 or bfloat16.
    head_dim_qk, head_dim_vo
        Head dimensions; both 64, 128 or 256.
    max_packed_rows
        Largest qo_len * group over the requests: at most 16 takes the decode kernel, more the prefill kernel.

    Raises
    ------
    TypeError
        For a dtype without a kernel.
    ValueError
        For head dimensions without a kernel.
    """
    dt = canonical_dtype(dtype)
    if dt not in DTYPES:
        fail_type("attention", "dtype", "has no CUDA kernel", dt, "float16 or bfloat16", "Cast q, k and v.")
    if head_dim_qk != head_dim_vo or head_dim_qk not in HEAD_DIMS:
        fail(
            "attention",
            "head_dim",
            "has no CUDA kernel",
            f"qk {head_dim_qk}, vo {head_dim_vo}",
            "qk = vo, one of 64, 128, 256",
        )
    return candidate_configs(arch, head_dim_qk, head_dim_vo, max_packed_rows)[0]


# ---- parameters ------------------------------------------------------------------------------------------------------------------
# What changes from run to run stands first, then what the work source needs, so that a launch is run values + constants.
_RUN_FIELDS = (
    ptr("q", "const scalar_t", "[tokens, num_qo_heads, head_dim_qk]"),
    ptr("k", "const scalar_t", "pages or tokens, by the strides"),
    ptr("v", "const scalar_t"),
    ptr("out", "scalar_t", "[tokens, num_qo_heads, head_dim_vo]"),
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
    f32("logit_scale", "sm_scale * log2(e); soft cap: 2 log2(e) sm_scale / cap"),
    f32("soft_cap_log2", "cap * log2(e)"),
    f32("v_scale", "multiplies the output"),
)
_SHAPE_FIELDS = (
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
PLAN_PARAMS = ParamStruct(
    "PlannedAttentionParams",
    *_RUN_FIELDS,
    *_SHAPE_FIELDS,
    ptr("plan_header", "const int32_t", "word 0: number of work items"),
    ptr("work", "const int32_t", "[n_work, 8]"),
    ptr("qo_indptr", "const int32_t", "[batch + 1], tokens"),
    ptr("kv_indptr", "const int32_t", "[batch + 1], pages or (ragged) tokens"),
    ptr("kv_len", "const int32_t", "[batch], tokens"),
)
SINGLE_PARAMS = ParamStruct(
    "SingleAttentionParams",
    *_RUN_FIELDS,
    *_SHAPE_FIELDS,
    i32("qo_len"),
    i32("kv_len"),
    i32("kv_chunk", "keys per split"),
    i32("num_splits"),
)
SOURCES = {"plan": PLAN_PARAMS, "single": SINGLE_PARAMS}
VARIANTS = {"plain": "PlainVariant", "softcap": "SoftCapVariant"}


@functools.cache
def gen_attention(
    config: AttentionConfig,
    dtype: DType | str,
    head_dim_qk: int,
    head_dim_vo: int,
    source: str = "plan",
    variant: str = "plain",
) -> JitSpec:
    """The spec of one attention kernel.

    Parameters
    ----------
    config
        From `attention_config` or `candidate_configs`.
    dtype
        float16 or bfloat16: of q, k, v and the output.
    source
        "plan": work items come from an AttentionPlan; "single": from arithmetic on one request's lengths.
    variant
        "plain" or "softcap".
    """
    dt = canonical_dtype(dtype)
    constants: dict[str, Any] = {
        "scalar_t": dt.ctype,
        "HEAD_DIM_QK": head_dim_qk,
        "HEAD_DIM_VO": head_dim_vo,
        "TILE_KV": config.tile_kv,
        "WARPS": config.num_warps,
        "CTAS_PER_SM": config.ctas_per_sm,
        "STAGES": config.stages,
        "Q_IN_REGISTERS": config.q_in_registers,
        "smem": config.smem,
        "source": source,
        "variant": VARIANTS[variant],
    }
    if config.kind == "prefill":
        constants["TILE_Q"] = config.tile_q
    dims = f"d{head_dim_qk}" if head_dim_qk == head_dim_vo else f"d{head_dim_qk}x{head_dim_vo}"
    return JitSpec(
        name=f"{config.kind}_sm80_{dt.short}_{dims}_{source}_{variant}_{config.tag}",
        template=f"{config.kind}/{config.kind}_sm80.cu.jinja",
        params=SOURCES[source],
        constants=tuple(constants.items()),
        block=config.block,
        smem=config.smem,
    )


def all_specs(archs: Iterable[int] = (80, 89, 90)) -> list[JitSpec]:
    """Every spec that the launch functions can ask for on the given architectures. The defaults stand for the three sizes of shared memory."""
    found: dict[JitSpec, None] = {}
    for arch in archs:
        for dim in HEAD_DIMS:
            for dtype in DTYPES:
                for rows in ROW_CLASSES:
                    config = attention_config(arch, dtype, dim, dim, rows)
                    for source in SOURCES:
                        for variant in VARIANTS:
                            found[gen_attention(config, dtype, dim, dim, source, variant)] = None
    return list(found)


# ---- FlashInfer's factory names (API.md section 19), with its argument order -----------------------------------------------------
def _module(
    op: str, source: str, row_classes: tuple[int, ...], dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_sliding_window: bool, use_logits_soft_cap: bool,
) -> JitModule:  # fmt: skip
    dtype = canonical_dtype(dtype_q, op, "dtype_q")
    for arg, other in (("dtype_kv", dtype_kv), ("dtype_o", dtype_o)):
        if canonical_dtype(other, op, arg) is not dtype:
            fail_type(op, arg, "differs from dtype_q", other, dtype, "q, k, v and the output have one dtype.")
    if pos_encoding_mode:
        fail(op, "pos_encoding_mode", "is not supported yet", pos_encoding_mode, "0 (NONE)")
    variant = "softcap" if use_logits_soft_cap else "plain"
    specs: dict[JitSpec, None] = {}
    for arch in env.default_archs():
        for rows in row_classes:
            config = attention_config(env.arch_number(arch), dtype, head_dim_qk, head_dim_vo, rows)
            specs[gen_attention(config, dtype, head_dim_qk, head_dim_vo, source, variant)] = None
    phase = op.removeprefix("gen_").removesuffix("_module")
    return JitModule(f"{phase}_{dtype.short}_d{head_dim_qk}x{head_dim_vo}_{variant}", tuple(specs))


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
    """The kernels of `single_prefill_with_kv_cache`, one for each tile height."""
    _check_backend("gen_single_prefill_module", backend, use_fp16_qk_reduction)
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
    return _module("gen_single_prefill_module", "single", ROW_CLASSES, *args)


def gen_batch_prefill_module(
    backend: str, dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, dtype_idx: DType | str, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of the batch prefill wrappers (paged and ragged are the same), one for each tile height. `dtype_idx`: int32."""
    _check_backend("gen_batch_prefill_module", backend, use_fp16_qk_reduction)
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
    return _module("gen_batch_prefill_module", "plan", ROW_CLASSES, *args)


def _check_backend(op: str, backend: str, use_fp16_qk_reduction: bool) -> None:
    if backend not in ("auto", "fa2"):
        fail(op, "backend", "is not available", repr(backend), "'auto' or 'fa2'")
    if use_fp16_qk_reduction:
        fail(op, "use_fp16_qk_reduction", "is not supported", True, "False", "Scores are accumulated in float32.")


def _check_index(op: str, dtype_idx: DType | str) -> None:
    if canonical_dtype(dtype_idx, op, "dtype_idx") is not INT32:
        fail_type(op, "dtype_idx", "is not supported", dtype_idx, "int32")
