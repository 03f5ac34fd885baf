"""Prefill attention for Hopper: when the sm90 kernel is taken, its configurations, specs and launch.

Plans are those of the sm80 family. Both families have prefill tiles of 128 packed rows, so a plan made for this one can also be run by that one,
which takes over what is not covered here (`covers`).
"""

from __future__ import annotations

import functools
import math
import os
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyinfer.core import tensormap
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType, canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.core.params import ParamStruct, i32, tensor_map
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
from pyinfer.jit.attention_config import AttentionConfig, prefill_config
from pyinfer.jit.attention_options import PLAIN, AttentionOptions
from pyinfer.jit.spec import JitSpec
from pyinfer.schedulers.plan import PLAN_COUNTER, SINGLE_COUNTER

if TYPE_CHECKING:
    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView

DTYPES = (BFLOAT16, FLOAT16)
HEAD_DIMS = (64, 128)
"""The usual head dimensions."""
MIN_HEAD_DIM, MAX_HEAD_DIM = 64, 256
L2_SHARE = 32 << 20  # bytes of keys and values that may count on staying in L2, of Hopper's 50 MB
MANY_ROWS = 1024  # no choice depends on more
MIN_ROWS = 65  # packed query rows of the largest request: below, the sm80 family's tiles of 64 and 16 rows waste less
COLUMNS = 64  # of a TMA box: 128 bytes
SLACK = 1024  # bytes for aligning the shared memory
WORKS, WORK_BYTES = 4, 64  # the kernel's ring of work items
_POINTERS = 8  # leading fields of _RUN_FIELDS: 64 bytes, so that the tensor maps behind them are aligned
_LEADING = struct.Struct(f"@{_POINTERS}P" + 4 * f"{tensormap.BYTES}s")  # the pointers and the maps behind them


@dataclass(frozen=True)
class Sm90Config:
    """How an sm90 kernel is cut: what `attention_config.AttentionConfig` says of an sm80 one.

    Attributes
    ----------
    tile_kv
        Keys of a tile: the width of the first product, a multiple of 16 up to 256.
    consumers
        Warpgroups of 64 rows each.
    stages
        Tiles in the rings of K and V.
    q_buffers
        Tiles of queries in shared memory. With 2 the next work item's first product runs while this one's output is written.
    dynamic
        Blocks take the next item when they are free, by a counter; otherwise in a fixed order.
    overlap
        Exponentials are kept in front of the wait for the product with V.
    gather
        K and V come row by row instead of by TMA: pages of any size, and any strides that are multiples of 16 bytes.
    trace
        Block 0 writes what its warps do, and when, to the partials (tools/gpu/time_sm90.py trace; plans without splits).
    """

    head_dim_qk: int
    head_dim_vo: int
    tile_kv: int
    consumers: int = 2
    stages: int = 2
    q_buffers: int = 1
    dynamic: bool = True
    overlap: bool = True
    gather: bool = False
    trace: bool = False
    kind: str = "prefill_sm90"
    ctas_per_sm: int = 1

    @property
    def tile_q(self) -> int:
        """Packed query rows of a tile."""
        return 64 * self.consumers

    @property
    def loaders(self) -> int:
        """Warps that bring K, and as many V. By TMA one is enough; row by row takes one for each 32 keys of a tile, if there are registers for so many."""
        return min(self.tile_kv // 32, 3) if self.gather and self.head_dim_vo <= 128 else 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads per block: the consumers, and a warpgroup for the producers; two where that many bring K and V."""
        return (128 * (self.consumers + (2 if self.loaders > 1 else 1)), 1, 1)

    @property
    def smem(self) -> int:
        """Dynamic shared memory per block in bytes: queries, the rings, barriers."""
        qk, vo = (-(-dim // 64) * 128 for dim in (self.head_dim_qk, self.head_dim_vo))  # bytes of a row
        q = self.q_buffers * self.tile_q * max(qk, vo)
        ring = self.stages * self.tile_kv * (qk + vo)
        control = WORKS * WORK_BYTES + (4 * self.stages + 3 * self.q_buffers + 3 * WORKS) * 8
        return -(-(q + ring + control) // 1024) * 1024 + SLACK

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's and of a consumer's thread: with those of all others (one consumer: of two blocks) at most 64 Ki."""
        if self.gather:
            return (40, 216) if self.loaders > 1 else (56, 224)
        return {1: (40, 216), 2: (40, 232), 3: (32, 160)}[self.consumers]

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        flags = (
            "q2" * (self.q_buffers == 2),
            "static" * (not self.dynamic),
            "late" * (not self.overlap),
            "gather" * self.gather,
            "trace" * self.trace,
        )
        return "_".join((f"q{self.tile_q}_kv{self.tile_kv}_s{self.stages}", *filter(None, flags)))


@functools.cache
def candidates(
    head_dim_qk: int, head_dim_vo: int | None = None, max_packed_rows: int = MANY_ROWS, wide: int = 0
) -> tuple[Sm90Config, ...]:
    """The configurations worth timing, the preferred one first.

    Parameters
    ----------
    head_dim_qk, head_dim_vo
        Head dimensions, multiples of 8 from 64 to 256; None: equal.
    max_packed_rows
        Of the largest request: up to 64 takes one consumer, two blocks a multiprocessor; many three consumers, where that many registers are enough.
    wide
        How many options look at the place of every score: tiles of fewer keys, for registers and code.
    """
    vo = head_dim_qk if head_dim_vo is None else head_dim_vo
    make = functools.partial(Sm90Config, head_dim_qk, vo)
    three = functools.partial(make, consumers=3, q_buffers=2)
    largest = max(head_dim_qk, vo)
    if wide and (max_packed_rows > 64 or largest > 128):
        if largest <= 128:
            return (make(96 if wide == 1 else 64, stages=2 if largest > 64 else 4, q_buffers=2),)
        return (make(64, q_buffers=2) if head_dim_qk <= 192 and vo <= 128 else make(48),)
    if max_packed_rows <= 64 and largest <= 128:
        small = functools.partial(make, consumers=1, ctas_per_sm=2)
        if largest <= 64:
            return (small(128, stages=2, q_buffers=2), small(64, stages=4, q_buffers=2))
        return (small(64, q_buffers=2), small(64))
    high = fills_192(max_packed_rows)
    if largest <= 64:
        two = make(128, stages=4, q_buffers=2)
        return (three(128, stages=3), two) if high else (two,)
    if largest <= 128:
        two = make(128, q_buffers=2)
        if not high:
            return (two,)
        return (three(80), three(80, overlap=False), three(80, dynamic=False), two)
    if head_dim_qk <= 192 and vo <= 128:
        two = make(128)
        return (make(96, q_buffers=2), two) if high else (two,)
    if largest <= 192:
        return (make(96),)
    return (make(80, overlap=False), make(80))


def fills_192(packed_rows: int) -> bool:
    """Whether tiles of 192 rows, the faster ones, waste at most a tenth over tiles of 128."""
    return packed_rows >= MANY_ROWS or -(-packed_rows // 192) * 192 <= 1.1 * (-(-packed_rows // 128) * 128)


@functools.cache
def enabled(arch: int) -> bool:
    """Whether this family may be chosen for an architecture number: on Hopper, unless PYINFER_SM90=0."""
    return arch == 90 and os.environ.get("PYINFER_SM90", "1") != "0"


def config_for(
    arch: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
) -> Sm90Config | None:
    """The configuration to plan with, or None: the sm80 family's. Arguments as `attention_config.attention_config`."""
    if (
        not enabled(arch)
        or dtype not in DTYPES
        or (kv_dtype is not None and kv_dtype is not dtype)
        or not all(d % 8 == 0 and MIN_HEAD_DIM <= d <= MAX_HEAD_DIM for d in (head_dim_qk, head_dim_vo))
        or (max_packed_rows < MIN_ROWS and options.family != "sm90")
        or not _supported(options)
    ):
        return None
    return candidates(head_dim_qk, head_dim_vo, max_packed_rows, _wide(options))[0]


def _wide(options: AttentionOptions) -> int:
    """How many options look at the place of every score."""
    user = options.user
    own = sum(hook in user.hooks for hook in ("logits", "mask")) if user is not None and user.places else 0
    return options.alibi + options.mask + options.multi_item + own


def _supported(options: AttentionOptions) -> bool:
    """Whether the kernel has the options: all that act on scores and outputs under a softmax, not those that act on operands."""
    user = options.user
    own = user is None or (user.softmax and "query" not in user.hooks)
    return options.rope is None and own and options.family != "sm80"


# ---- specs -----------------------------------------------------------------------------------------------------------------------
@functools.cache
def sm90_params(source: str, options: AttentionOptions = PLAIN) -> ParamStruct:
    """The sm80 family's fields, with the tensor maps behind the first eight pointers and the box height at the end."""
    maps = (
        tensor_map("k_map", "4-D: head_dim, token, head, page"),
        tensor_map("v_map"),
        tensor_map("q_map", "4-D: head_dim, head, token, 1"),
        tensor_map("o_map"),
    )
    fields = (
        *_RUN_FIELDS[:_POINTERS],
        *maps,
        *_RUN_FIELDS[_POINTERS:],
        *_SCALE_FIELDS,
        *option_fields(options),
        *SHAPE_FIELDS,
        *SOURCE_FIELDS[source],
    )
    return ParamStruct(
        f"{'Planned' if source == 'plan' else 'Single'}Sm90Params",
        *fields,
        i32("box_rows", "keys of a TMA box"),
        i32("boxed", "1: whole tiles of queries are boxes, 2: of the output"),
        i32("heads_at_once", "kv heads whose items take turns"),
    )


@functools.cache
def gen_prefill_sm90(
    config: Sm90Config,
    dtype: DType | str,
    source: str = "plan",
    variant: str = "plain",
    options: AttentionOptions = PLAIN,
    out_dtype: DType | str | None = None,
) -> JitSpec:
    """The spec of one kernel.

    Parameters
    ----------
    config
        From `config_for` or `candidates`.
    dtype
        Of q, k and v: float16 or bfloat16.
    source, variant, options
        As in `attention.gen_attention`; no RoPE, no query function and no variant without softmax.
    out_dtype
        float16, bfloat16 or float32. None: dtype.
    """
    dt = canonical_dtype(dtype)
    out = dt if out_dtype is None else canonical_dtype(out_dtype)
    features, name = _features(VARIANTS[variant], options)
    producer, consumer = config.registers
    constants = {
        "scalar_t": dt.ctype,
        "out_t": out.ctype,
        "HEAD_DIM_QK": config.head_dim_qk,
        "HEAD_DIM_VO": config.head_dim_vo,
        "TILE_KV": config.tile_kv,
        "CONSUMERS": config.consumers,
        "STAGES": config.stages,
        "Q_BUFFERS": config.q_buffers,
        "LOADERS": config.loaders,
        "dynamic": config.dynamic,
        "counter_at": PLAN_COUNTER if source == "plan" else SINGLE_COUNTER,
        "overlap": config.overlap,
        "gather": config.gather,
        "trace": config.trace,
        "PRODUCER_REGISTERS": producer,
        "CONSUMER_REGISTERS": consumer,
        "smem": config.smem,
        "source": source,
        "FEATURES": features,
        "CTAS_PER_SM": config.ctas_per_sm,
        "user_variant_source": options.user.source if options.user is not None else "",
    }
    dims = f"d{config.head_dim_qk}" + (f"x{config.head_dim_vo}" if config.head_dim_vo != config.head_dim_qk else "")
    result = "" if out is dt else f"_{out.short}out"
    return JitSpec(
        name=f"prefill_sm90_{dt.short}_{dims}_{source}_{name}_{config.tag}{result}",
        template="prefill/prefill_sm90.cu.jinja",
        params=sm90_params(source, options),
        constants=tuple(constants.items()),
        block=config.block,
        smem=config.smem,
        min_arch=90,
        max_arch=90,
        link=options.user.functions if options.user is not None else (),
    )


AHEAD = (
    # head_dim_qk, head_dim_vo, dtypes, variants, options
    (128, 128, DTYPES, ("plain", "softcap"), PLAIN),
    (64, 64, DTYPES, ("plain", "softcap"), PLAIN),
    (256, 256, DTYPES[:1], ("plain",), PLAIN),
    (256, 256, DTYPES[1:], ("softcap",), PLAIN),
    (192, 128, DTYPES[:1], ("plain",), PLAIN),
    (96, 96, DTYPES[1:], ("plain",), PLAIN),
    (128, 128, DTYPES[:1], ("plain",), AttentionOptions(mask=True)),
    (128, 128, DTYPES[:1], ("softcap",), AttentionOptions(alibi=True, mask=True, multi_item=True, sinks=True)),
    (64, 64, DTYPES[:1], ("plain",), AttentionOptions(sinks=True)),
)
"""What is worth building ahead, with each option at least once; the rest is compiled when asked for."""


def all_specs() -> list[JitSpec]:
    """The specs of `AHEAD`. They are for 9.0a alone."""
    found: dict[JitSpec, None] = {}
    for i, (qk, vo, dtypes, variants, options) in enumerate(AHEAD):
        config = candidates(qk, vo, MANY_ROWS, _wide(options))[0]
        for dtype in dtypes:
            for variant in variants:
                for source in SOURCES if len(dtypes) > 1 else SOURCES[i % 2 : i % 2 + 1]:
                    taken = with_cap(config) if variant == "softcap" else config
                    found[gen_prefill_sm90(taken, dtype, source, variant, options)] = None
    # Short requests, and pages of any size.
    for dim in (64, 128, 256):
        others = [candidates(dim, dim, MIN_ROWS)[0], gathering(dim, dim)] + [candidates(dim, dim, 64)[0]] * (dim <= 128)
        found |= dict.fromkeys(gen_prefill_sm90(config, DTYPES[0]) for config in others)
    # Another dtype for the output.
    config = candidates(128)[0]
    for out in (FLOAT32, FLOAT16):
        found[gen_prefill_sm90(config, BFLOAT16, "plan", "plain", PLAIN, out)] = None
    return list(found)


def reachable_specs(
    arch: int, dtype: DType | str, head_dim_qk: int, head_dim_vo: int, source: str, variant: str, options: AttentionOptions = PLAIN,
    out_dtype: DType | str | None = None,
) -> list[JitSpec]:  # fmt: skip
    """The kernels that prefill takes of this family on an architecture, for short and long requests and pages of any size; none where it has none."""
    specs: dict[JitSpec, None] = {}
    for rows in (1, MIN_ROWS, MANY_ROWS):
        config = config_for(arch, canonical_dtype(dtype), head_dim_qk, head_dim_vo, rows, None, options)
        if config is not None:
            for page_size in (0, 1) if source == "plan" else (0,):
                taken = for_pages(config, page_size)
                taken = with_cap(taken) if variant == "softcap" else taken
                specs[gen_prefill_sm90(taken, dtype, source, variant, options, out_dtype)] = None
    return list(specs)


@functools.cache
def kernel_of(
    device: int,
    config: Sm90Config,
    dtype: DType,
    source: str,
    variant: str,
    options: AttentionOptions,
    out_dtype: DType,
) -> Kernel:
    """The loaded kernel of a CUDA device."""
    return gen_prefill_sm90(config, dtype, source, variant, options, out_dtype).build_and_load(device)


# ---- launch ----------------------------------------------------------------------------------------------------------------------
def for_pages(config: Sm90Config, page_size: int) -> Sm90Config:
    """The configuration, or where TMA cannot read such pages the one that gathers."""
    return config if box_rows(config, page_size) else gathering(config.head_dim_qk, config.head_dim_vo)


@functools.cache
def gathering(head_dim_qk: int, head_dim_vo: int) -> Sm90Config:
    """The configuration that reads pages of any size: more stages of fewer keys, as rows take longer to arrive than boxes."""
    make = functools.partial(Sm90Config, head_dim_qk, head_dim_vo, gather=True)
    largest = max(head_dim_qk, head_dim_vo)
    if largest <= 64:
        return make(96, stages=6, q_buffers=2)
    if largest <= 128:
        return make(96, stages=3, q_buffers=2)
    return make(64, stages=3) if head_dim_qk <= 192 and head_dim_vo <= 128 else make(64)


@functools.cache
def with_cap(config: Any) -> Any:
    """The configuration for soft-capped logits, which take registers where tiles are large: of fewer keys there. Plans stay as they are."""
    if isinstance(config, Sm90Config) and not config.gather:
        most = {64: 96 if config.consumers == 3 else 128, 256: 64}.get(config.head_dim_vo, 128)
        return replace(config, tile_kv=min(config.tile_kv, most))
    return config


def box_rows(config: Sm90Config, page_size: int) -> int:
    """Keys of a TMA box: a whole tile of a ragged tensor, else the most that divides both page and tile. 0: pages too small or odd for boxes."""
    if config.gather:
        return 1
    if not page_size:
        return config.tile_kv
    rows = math.gcd(page_size, config.tile_kv)
    return rows if rows % 8 == 0 else 0  # the swizzle repeats every 8 rows


CASES = "a Hopper GPU, float16 or bfloat16 throughout, head dimensions of 64 to 256, no RoPE on the fly, no variant with a query function or without softmax"
"""What `config_for` wants."""
TENSORS = "k and v of q's dtype, all aligned to 16 bytes, some keys"
"""What `covers` wants."""


def stand_in(preferred: AttentionConfig, head_dim_qk: int, head_dim_vo: int, tile_q: int) -> AttentionConfig:
    """The sm80 configuration that runs what was planned for an sm90 one: the preferred one of the case, unless that has other tiles."""
    if preferred.tile_q == tile_q or tile_q not in (128, 192):
        return preferred
    if tile_q == 128:  # options at head dimensions beyond 128, for which that family prefers 64 rows
        return prefill_config(head_dim_qk, head_dim_vo, tile_q=128, tile_kv=64, num_warps=8, ctas_per_sm=1)
    # Six warps of 32 rows. 48 keys: 8 a warp, which is the least that it can copy.
    return prefill_config(head_dim_qk, head_dim_vo, tile_q=192, tile_kv=48, num_warps=6, ctas_per_sm=1)


def grid(config: Sm90Config, device: int, items: int) -> int:
    """Blocks to launch for so many work items, each of one kv head."""
    from pyinfer.core.device import num_sms

    return min(items, num_sms(device) * config.ctas_per_sm)


def tma_view(x: TensorView, kv_layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K or V as a 4-D tensor (head_dim, token, head, page): shape, and strides of the outer three axes. A ragged tensor is one page."""
    shape, strides = tuple(x.shape), tuple(x.strides)
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    pages, first, second, dim = shape
    page, a, b, _ = strides
    return (
        ((dim, second, first, pages), (b, a, page))
        if kv_layout == "HND"
        else ((dim, first, second, pages), (a, b, page))
    )


def covers(
    config: Sm90Config, q: TensorView, k: TensorView, v: TensorView, out: TensorView, kv_layout: str, page_size: int, options: AttentionOptions,
    aligned: bool,
) -> bool:  # fmt: skip
    """Whether the kernel can run a call. Without keys there is nothing that could be read."""
    size = k.dtype.itemsize
    return (
        aligned
        and 0 not in k.shape
        and _supported(options)
        and k.dtype is q.dtype is v.dtype
        and box_rows(config, page_size) > 0
        and (config.gather or all(tensormap.encodable(x.ptr, *tma_view(x, kv_layout), size) for x in (k, v)))
    )


def check(config: Sm90Config, *call: Any) -> None:
    """ValueError if a configuration was asked for that cannot run the call; arguments as `covers`."""
    if not covers(config, *call):
        fail(
            "attention", "config", "cannot run this call", config.tag, "what attention_sm90.covers", "Pass config=None."
        )


def heads_at_once(config: Sm90Config, num_kv_heads: int, tokens: int) -> int:
    """How many kv heads to work on at a time, so that their keys and values, of so many tokens in all, stay in L2."""
    size = max(tokens, 1) * (config.head_dim_qk + config.head_dim_vo) * 2
    sections = -(-num_kv_heads // max(1, L2_SHARE // size))
    return -(-num_kv_heads // sections)


def boxed(q: TensorView, out: TensorView, group: int) -> int:
    """Whether whole tiles of queries (1) and of 16-bit output (2) are boxes of their tensors."""
    if 64 % group:
        return 0
    return sum(
        bit for bit, x in ((1, q), (2, out)) if x.dtype.itemsize == 2 and tensormap.encodable(x.ptr, *row_view(x), 2)
    )


def row_view(x: TensorView) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries or output as a 4-D tensor (head_dim, head, token, 1): shape, and strides of the outer three axes."""
    tokens, heads, dim = x.shape
    return (dim, heads, tokens, 1), (x.strides[1], x.strides[0], 0)


Map = tuple[Any, ...]
"""Arguments of `tensormap.encode` behind the address; () where the kernel needs no map."""


def maps_of(
    config: Sm90Config, q: TensorView, k: TensorView, v: TensorView, out: TensorView, kv_layout: str, page_size: int, group: int, flags: int
) -> tuple[Map, Map, Map, Map]:  # fmt: skip
    """What to encode for k, v, q and out; `flags` from `boxed`."""
    box = (COLUMNS, 0 if config.gather else box_rows(config, page_size), 1, 1)
    rows = (COLUMNS, group, 64 // group, 1)
    kv = [() if config.gather else (x.dtype, *tma_view(x, kv_layout), box) for x in (k, v)]
    qo = [(x.dtype, *row_view(x), rows) if flags & bit else () for bit, x in ((1, q), (2, out))]
    return kv[0], kv[1], qo[0], qo[1]


def encode(maps: tuple[Map, ...], q: int, k: int, v: int, out: int) -> tuple[bytes, ...]:
    """The tensor maps of `maps_of` at these addresses."""
    return tuple([m[address] for m, address in zip(_tables(maps), (k, v, q, out), strict=True)])


class _NoMap:
    """In the place of a table where the kernel needs no map."""

    def __getitem__(self, address: int) -> bytes:
        return _EMPTY


_EMPTY, _NO_MAP = bytes(tensormap.BYTES), _NoMap()


def _tables(maps: tuple[Map, ...]) -> list[tensormap.Maps | _NoMap]:
    return [tensormap.table(*m) if m else _NO_MAP for m in maps]


def bind(kernel: Kernel, grid: int, values: tuple[Any, ...], maps: tuple[Map, ...], pdl: bool) -> BoundLaunch:
    """A bound launch (`core.launch.BoundLaunch`) of five pointers, q, k, v, out and lse, whose tensor maps follow them."""
    bound = kernel.bind(grid, values, 5, pdl)
    of_k, of_v, of_q, of_out = _tables(maps)
    fixed, pack_into = values[5:_POINTERS], _LEADING.pack_into

    def pack(buffer: Any, at: int, q: int, k: int, v: int, out: int, lse: int) -> None:
        pack_into(buffer, at, q, k, v, out, lse, *fixed, of_k[k], of_v[v], of_q[q], of_out[out])

    bound.pack_with(pack)
    return bound
