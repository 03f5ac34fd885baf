"""Prefill attention with queries, keys and values in float8_e4m3fn on Hopper: configurations, specs and launch parameters.

Plans are those of the other prefill families. There is no stand-in: what this kernel does not do is refused, with the way around it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyinfer.core import tensormap
from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, DType, canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.core.params import ParamStruct, i32, ptr, tensor_map
from pyinfer.jit.attention import (
    _RUN_FIELDS,
    _SCALE_FIELDS,
    SHAPE_FIELDS,
    SOURCE_FIELDS,
    SOURCES,
    VARIANTS,
    _features,
    option_fields,
)
from pyinfer.jit.attention_options import PLAIN, AttentionOptions
from pyinfer.jit.attention_sm90 import L2_SHARE, MANY_ROWS, WORK_BYTES, WORKS, Map, fills_192, row_view, tma_view
from pyinfer.jit.spec import JitSpec

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.core.tensor import TensorView

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
"""(head_dim_qk, head_dim_vo) of the kernels."""
OUT_DTYPES = (BFLOAT16, FLOAT16)
COLUMNS, OUT_COLUMNS = 128, 64  # of a TMA box: 128 bytes
ARCH = 90
_POINTERS = 8  # leading fields of _RUN_FIELDS: 64 bytes, so that the tensor maps behind them are aligned
INSTEAD = "Convert q to float16 or bfloat16; keys and values may stay in fp8."


@dataclass(frozen=True)
class Fp8Config:
    """How the kernel is cut.

    Attributes
    ----------
    tile_kv
        Keys of a tile, a multiple of 32 up to 256.
    consumers
        Warpgroups of 64 packed rows each.
    k_stages, v_stages, t_stages
        Tiles in the rings of keys, of values as they come, and of transposed values.
    q_buffers
        Tiles of queries in shared memory. With 2 the next work item's first product runs while this one's output is written.
    """

    head_dim_qk: int
    head_dim_vo: int
    tile_kv: int
    consumers: int
    k_stages: int = 2
    v_stages: int = 2
    t_stages: int = 2
    q_buffers: int = 2
    kind: str = "prefill_fp8_sm90"
    ctas_per_sm: int = 1

    @property
    def tile_q(self) -> int:
        """Packed query rows of a tile."""
        return 64 * self.consumers

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads per block: the consumers, and a warpgroup of producers."""
        return (128 * (self.consumers + 1), 1, 1)

    @property
    def smem(self) -> int:
        """Dynamic shared memory per block in bytes: queries, the three rings, barriers."""
        qk, vo = (-(-dim // 128) * 128 for dim in (self.head_dim_qk, self.head_dim_vo))  # bytes of a row of 8 bits
        q = self.q_buffers * self.tile_q * max(qk, 2 * self.head_dim_vo)
        rings = self.tile_kv * (self.k_stages * qk + self.v_stages * vo)
        transposed = self.t_stages * -(-self.tile_kv // 128) * 128 * self.head_dim_vo
        barriers = 2 * (self.k_stages + self.v_stages + self.t_stages + self.q_buffers + WORKS) * 8
        control = WORKS * WORK_BYTES + self.q_buffers * 8 + barriers
        return -(-(q + rings + transposed + control) // 1024) * 1024

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's and of a consumer's thread: with those of all others at most 64 Ki."""
        return {1: (56, 240), 2: (40, 232), 3: (32, 160)}[self.consumers]

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        stages = f"s{self.k_stages}{self.v_stages}{self.t_stages}"
        return f"q{self.tile_q}_kv{self.tile_kv}_{stages}" + "_q2" * (self.q_buffers == 2)


@functools.cache
def candidates(head_dim_qk: int, head_dim_vo: int, max_packed_rows: int = MANY_ROWS) -> tuple[Fp8Config, ...]:
    """The configurations worth timing, the preferred one first, for head dimensions of `HEAD_DIMS` and the packed rows of the largest request."""
    make = functools.partial(Fp8Config, head_dim_qk, head_dim_vo)
    largest = max(head_dim_qk, head_dim_vo)
    if largest > 128:
        return (make(96, 2, q_buffers=1),)
    if max_packed_rows <= 64:
        return (make(128, 1),)
    if largest <= 64 and fills_192(max_packed_rows):
        return (make(160, 3), make(160, 2))
    return (make(160, 2), make(128, 2, k_stages=3))


def narrowed(config: Fp8Config) -> Fp8Config:
    """The configuration for a soft cap, sinks or scales of heads, which take registers that three consumers do not have beside 160 keys."""
    return replace(config, tile_kv=128) if config.consumers == 3 else config


def config_for(
    head_dim_qk: int, head_dim_vo: int, max_packed_rows: int, kv_dtype: DType | None, options: AttentionOptions
) -> Fp8Config:
    """The configuration to plan with. Arguments as `attention_config.attention_config`; ValueError where there is no kernel."""
    check_case("attention", head_dim_qk, head_dim_vo, kv_dtype, options)
    return candidates(head_dim_qk, head_dim_vo, min(max_packed_rows, MANY_ROWS))[0]


def check_case(
    op: str, head_dim_qk: int, head_dim_vo: int, kv_dtype: DType | None = None, options: AttentionOptions = PLAIN
) -> None:
    """ValueError for what the kernel does not do, whatever the tensors."""
    if (head_dim_qk, head_dim_vo) not in HEAD_DIMS:
        wanted = ", ".join(str(qk) if qk == vo else f"{qk} (qk) with {vo} (vo)" for qk, vo in HEAD_DIMS)
        got = f"{head_dim_qk} (qk), {head_dim_vo} (vo)"
        fail(op, "head_dim", "has no kernel for float8_e4m3fn queries", got, wanted, INSTEAD)
    if kv_dtype not in (None, FLOAT8_E4M3):
        fail(op, "k", "differs in dtype from float8_e4m3fn queries", kv_dtype.name, "float8_e4m3fn", INSTEAD)
    found = [name for name in ("alibi", "rope", "mask", "multi_item", "user") if getattr(options, name)]
    if options.family == "sm80":
        found.append("backend='fa2'")
    if found:
        words = {"rope": "ROPE_LLAMA", "alibi": "ALIBI", "mask": "a custom mask", "multi_item": "multi-item scoring"}
        got = ", ".join(words.get(name, "a variant" if name == "user" else name) for name in found)
        wanted = "causality, a window, a soft cap and sinks"
        fail(op, "q", "in float8_e4m3fn goes without some options", got, wanted, INSTEAD)


def check_device(op: str, arch: int) -> None:
    """ValueError unless a GPU of this architecture number has the kernel."""
    if arch != ARCH:
        got = f"compute capability {arch // 10}.{arch % 10}"
        fail(op, "q", "in float8_e4m3fn has no kernel on this GPU", got, "Hopper (9.0)", INSTEAD)


# ---- specs -----------------------------------------------------------------------------------------------------------------------
@functools.cache
def fp8_params(source: str, options: AttentionOptions = PLAIN, head_scales: bool = False) -> ParamStruct:
    """The sm80 family's fields, with the tensor maps behind the first eight pointers, and at the end the heads' own scales, if they have any."""
    maps = (
        tensor_map("k_map", "4-D: head_dim, token, head, page"),
        tensor_map("v_map"),
        tensor_map("q_map", "4-D: head_dim, head, token, 1"),
        tensor_map("o_map"),
    )
    more = (
        i32("box_rows", "keys of a TMA box"),
        i32("boxed", "1: whole tiles of queries are boxes, 2: of the output"),
        i32("heads_at_once", "kv heads whose items take turns"),
    )
    scales = (
        ptr("q_scales", "const float", "[num_qo_heads], what a stored 1 is worth; null: 1"),
        ptr("k_scales", "const float", "[num_kv_heads]; null: 1"),
        ptr("v_scales", "const float", "[num_kv_heads]; null: 1"),
    )
    fields = (
        *_RUN_FIELDS[:_POINTERS],
        *maps,
        *_RUN_FIELDS[_POINTERS:],
        *_SCALE_FIELDS,
        *option_fields(options),
        *SHAPE_FIELDS,
        *SOURCE_FIELDS[source],
        *more,
        *(scales if head_scales else ()),
    )
    return ParamStruct(f"{'Planned' if source == 'plan' else 'Single'}Fp8Params", *fields)


@functools.cache
def gen_prefill_fp8(
    config: Fp8Config,
    out_dtype: DType | str,
    source: str = "plan",
    variant: str = "plain",
    options: AttentionOptions = PLAIN,
    head_scales: bool = False,
) -> JitSpec:
    """The spec of one kernel.

    Parameters
    ----------
    config
        From `config_for` or `candidates`.
    out_dtype
        float16 or bfloat16.
    source, variant
        As in `attention.gen_attention`.
    options
        Sinks, or none.
    head_scales
        Whether every head has scales of its own.
    """
    dt = canonical_dtype(out_dtype)
    features, name = _features(VARIANTS[variant], options)
    producer, consumer = config.registers
    constants = {
        "out_t": dt.ctype,
        "HEAD_DIM_QK": config.head_dim_qk,
        "HEAD_DIM_VO": config.head_dim_vo,
        "TILE_KV": config.tile_kv,
        "CONSUMERS": config.consumers,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "T_STAGES": config.t_stages,
        "Q_BUFFERS": config.q_buffers,
        "PRODUCER_REGISTERS": producer,
        "CONSUMER_REGISTERS": consumer,
        "smem": config.smem,
        "source": source,
        "FEATURES": features,
        "head_scales": head_scales,
    }
    dims = f"d{config.head_dim_qk}" + (f"x{config.head_dim_vo}" if config.head_dim_vo != config.head_dim_qk else "")
    return JitSpec(
        name=f"prefill_fp8_sm90_{dt.short}_{dims}_{source}_{name}{'_heads' * head_scales}_{config.tag}",
        template="prefill/prefill_fp8_sm90.cu.jinja",
        params=fp8_params(source, options, head_scales),
        constants=tuple(constants.items()),
        block=config.block,
        smem=config.smem,
        min_arch=ARCH,
        max_arch=ARCH,
    )


def all_specs() -> list[JitSpec]:
    """What is worth building ahead: every head dimension and tile height, with each option at least once. They are for 9.0a alone."""
    found: dict[JitSpec, None] = {}
    for i, (qk, vo) in enumerate(HEAD_DIMS):
        for rows in (64, 128, MANY_ROWS) if (qk, vo) == (128, 128) else (MANY_ROWS,):
            found[gen_prefill_fp8(candidates(qk, vo, rows)[0], OUT_DTYPES[i % 2], SOURCES[i % 2])] = None
    usual = candidates(128, 128)[0]
    for dtype in OUT_DTYPES:
        for source in SOURCES:
            found[gen_prefill_fp8(usual, dtype, source)] = None
    narrow = narrowed(usual)
    found[gen_prefill_fp8(narrow, BFLOAT16, "plan", "softcap")] = None
    found[gen_prefill_fp8(narrow, BFLOAT16, "plan", "plain", PLAIN, True)] = None
    found[gen_prefill_fp8(narrow, BFLOAT16, "single", "softcap", AttentionOptions(sinks=True), True)] = None
    return list(found)


@functools.cache
def kernel_of(
    device: int, config: Fp8Config, out_dtype: DType, source: str, variant: str, options: AttentionOptions = PLAIN,
    head_scales: bool = False,
) -> Kernel:  # fmt: skip
    """The loaded kernel of a CUDA device."""
    return gen_prefill_fp8(config, out_dtype, source, variant, options, head_scales).build_and_load(device)


# ---- launch ----------------------------------------------------------------------------------------------------------------------
def box_rows(config: Fp8Config, page_size: int) -> int:
    """Keys of a TMA box: a whole tile of a ragged tensor, else the most that divides both page and tile. 0: pages of no multiple of 8 tokens."""
    if not page_size:
        return config.tile_kv
    rows = math.gcd(page_size, config.tile_kv)
    return rows if rows % 8 == 0 else 0  # the swizzle repeats every 8 rows


def check_pages(op: str, page_size: int) -> None:
    """ValueError for pages that TMA cannot read."""
    if page_size % 8:
        wanted = "a multiple of 8 tokens for float8_e4m3fn queries"
        fail(op, "page_size", "is no multiple of 8", page_size, wanted, INSTEAD)


def sources(q: TensorView, k: TensorView, v: TensorView) -> tuple[TensorView, TensorView]:
    """The tensors that the maps of keys and values are of."""
    return (q, q) if 0 in k.shape else (k, v)


def check_tensors(op: str, k: TensorView, v: TensorView, kv_layout: str, aligned: bool) -> None:
    """ValueError for tensors that TMA cannot read."""
    empty = 0 in k.shape
    if not aligned or not all(empty or tensormap.encodable(x.ptr, *tma_view(x, kv_layout), 1) for x in (k, v)):
        got = f"strides {tuple(k.strides)} (k), {tuple(v.strides)} (v)"
        wanted = "addresses and strides in multiples of 16 bytes for float8_e4m3fn queries"
        fail(op, "q, k, v or out", "is not aligned", got, wanted, "Pass x.contiguous().")


def grid(device: int, items: int) -> int:
    """Blocks to launch for so many work items, each of one kv head."""
    from pyinfer.core.device import num_sms

    return min(items, num_sms(device))


def heads_at_once(config: Fp8Config, num_kv_heads: int, tokens: int) -> int:
    """How many kv heads to work on at a time, so that their keys and values, of so many tokens in all, stay in L2."""
    size = max(tokens, 1) * (config.head_dim_qk + config.head_dim_vo)
    return max(1, min(num_kv_heads, L2_SHARE // size))


def boxed(q: TensorView, out: TensorView, group: int) -> int:
    """Whether whole tiles of queries (1) and of the output (2) are boxes of their tensors."""
    if 64 % group:
        return 0
    return sum(bit for bit, x in ((1, q), (2, out)) if tensormap.encodable(x.ptr, *row_view(x), x.dtype.itemsize))


def maps_of(
    config: Fp8Config, q: TensorView, k: TensorView, v: TensorView, out: TensorView, kv_layout: str, page_size: int, group: int, flags: int
) -> tuple[Map, Map, Map, Map]:  # fmt: skip
    """What to encode for k, v, q and out; `flags` from `boxed`."""
    kv_box = (COLUMNS, box_rows(config, page_size), 1, 1)
    if 0 in k.shape:  # items without keys bring a tile nevertheless, whatever it holds: of the queries (`sources`)
        k_map = v_map = (q.dtype, *row_view(q), kv_box)
    else:
        k_map, v_map = ((x.dtype, *tma_view(x, kv_layout), kv_box) for x in (k, v))
    q_map = (q.dtype, *row_view(q), (COLUMNS, group, 64 // group, 1)) if flags & 1 else ()
    o_map = (out.dtype, *row_view(out), (OUT_COLUMNS, group, 64 // group, 1)) if flags & 2 else ()
    return k_map, v_map, q_map, o_map
