"""Specs of rotary position embedding, and the table of frequencies its kernels take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from pyinfer._rope import MANY_TOKENS
from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u32, u64_array
from pyinfer.jit.page import PLACES
from pyinfer.jit.spec import JitModule, JitSpec

MODES = ("pos_ids", "indptr", "cache")
"""Where positions come from: one per row; requests' row pointers and offsets; one per row, with cosines and sines from a table."""


@functools.cache
def rope_params(mode: str, pairs: int) -> ParamStruct:
    """The parameter struct of a mode, pointers first. The table of frequencies travels by value: no buffer to keep, nothing to upload."""
    pointers = (
        ptr("q", "const scalar_t", "[tokens, num_q_heads, head_dim]"),
        ptr("k", "const scalar_t", "[tokens, num_heads - num_q_heads, head_dim]"),
        ptr("q_out", "scalar_t", "as q; may be q"),
        ptr("k_out", "scalar_t", "as k; may be k"),
    )
    common = (
        *(i64(f"{t}_stride_{axis}", "elements") for t in ("q", "k", "q_out", "k_out") for axis in ("n", "h")),
        i32("num_q_heads"),
        i32("num_heads", "q's and k's"),
        i32("parts", "blocks per token"),
        i32("tail", "elements beyond the rotated ones to copy; 0 in place"),
        i32("wide", "whether index arrays are int64"),
    )
    table = u64_array("frequency", pairs, "turns per position, times 2^64")
    if mode == "pos_ids":
        return ParamStruct("RopePosIdsParams", *pointers, ptr("positions", "const void", "[tokens]"), table, *common)
    if mode == "indptr":
        requests = (ptr("indptr", "const void", "[num_requests + 1]"), ptr("offsets", "const void", "[num_requests]"))
        return ParamStruct("RopeIndptrParams", *pointers, *requests, table, *common, i32("num_requests"))
    cache = (
        ptr("cos_sin_cache", "const float", "[max_position, 2 * PAIRS]: cosines, then sines"),
        ptr("positions", "const void", "[tokens]"),
    )
    return ParamStruct(
        "RopeCacheParams", *pointers, *cache, i64("cache_stride", "elements"), i64("max_position"), *common
    )


@functools.lru_cache(maxsize=256)
def frequency_table(
    rotary_dim: int,
    rope_scale: float,
    rope_theta: float,
    low_freq_factor: float = 0.0,
    high_freq_factor: float = 0.0,
    old_context_len: float = 0.0,
) -> np.ndarray:
    """Turns per position of every pair, as uint64 fractions of a turn scaled by 2^64 (read-only, [rotary_dim / 2]).

    Pair i turns by f = rope_theta^(-2 i / rotary_dim) / rope_scale radians per position (Su et al., arXiv 2104.09864). With `old_context_len` Llama 3.1's
    smoothing applies: s f + (1 - s) f / rope_scale, s = clamp((old_context_len f / 2 pi - low) / (high - low), 0, 1), so that short wave lengths stay.

    An angle is position * entry modulo 2^64: exact integer arithmetic. The entry itself is off by at most 2^-53 relative, so that a whole angle is off
    by less than 2^-40 turns at position 10^6, plus the rounding of the fraction to float32.
    """
    f = np.float64(rope_theta) ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / -rotary_dim)
    if old_context_len:
        smooth = np.clip(
            (old_context_len * f / (2.0 * math.pi) - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0
        )
        f = (1.0 - smooth) * (f / rope_scale) + smooth * f
    else:
        f = f / rope_scale
    return _as_turns(f)


def _as_turns(radians: np.ndarray) -> np.ndarray:
    turns = (radians / (2.0 * math.pi)) % 1.0  # whole turns per position do not show
    table = np.array([int(t * 2.0**64) & (2**64 - 1) for t in turns], dtype=np.uint64)
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=256)
def frequency_bytes(*key: float) -> bytes:
    """`frequency_table(*key)` as the kernel parameter."""
    return frequency_table(*key).tobytes()


@functools.lru_cache(maxsize=256)
def grid_frequency_table(
    channels: tuple[int, int, int], base: float, factor: float, low: float, high: float
) -> np.ndarray:
    """As `frequency_table`, of pairs shared out to the three coordinates of a grid: `channels` elements of a head turn with each, in order.

    Pair j of a coordinate's n / 2 turns by f = base^(-2 j / n). With a `factor` other than 1 YaRN's ramp applies (Peng et al., arXiv 2309.00071): from
    pair `low` to pair `high` the turn goes over from f to f / factor. (As in FlashInfer, coordinates' pairs are counted separately.)
    """
    parts = []
    for n in channels:
        j = np.arange(n // 2, dtype=np.float64)
        f = np.float64(base) ** (-2.0 * j / max(n, 1))
        if factor != 1.0:
            beyond = high + 0.001 if abs(low - high) <= 1e-6 else high
            ramp = np.clip((j - low) / (beyond - low), 0.0, 1.0)
            f = f / factor * ramp + f * (1.0 - ramp)
        parts.append(f)
    return _as_turns(np.concatenate(parts))


@dataclass(frozen=True)
class RopeConfig:
    """How a token's heads are spread over threads.

    Attributes
    ----------
    heads
        Threads along the heads.
    unroll
        Heads per thread: a block works on up to heads * unroll.
    load
        Access function of `cuda_src/common/vec_io.cuh`.
    """

    heads: int
    unroll: int
    load: str = "load"

    @property
    def short(self) -> str:
        """What tells it apart in a kernel's name."""
        past = "" if self.load == "load" else self.load.removeprefix("load")
        return f"h{self.heads}_u{self.unroll}{past}"


def rope_config(slots: int, num_heads: int, tokens: int = MANY_TOKENS) -> RopeConfig:
    """About 128 threads of `slots` a head, in blocks of equal size.

    With many tokens a thread takes up to four heads: the sines are computed once for all, and there are blocks enough. With few it takes one, and the kernel is
    shorter,
    which shows where the code has to be fetched: 6.9 against 7.1 us at 128 tokens. Through L1: past it 87.3 us against 85.8 at 16384 tokens of 32/8 heads.
    """
    return _spread(slots, num_heads, 4 if tokens >= MANY_TOKENS else 1, 128)


def _spread(slots: int, num_heads: int, unroll: int, threads: int) -> RopeConfig:
    passes = -(-num_heads // max(1, threads // slots))
    blocks = -(-passes // unroll)
    per_thread = -(-passes // blocks)
    return RopeConfig(-(-num_heads // (blocks * per_thread)), per_thread)


def rope_candidates(slots: int, num_heads: int) -> list[RopeConfig]:
    """Configurations worth timing, the default for many tokens first (tools/gpu/time_ops.py)."""
    default = rope_config(slots, num_heads)
    others = [_spread(slots, num_heads, unroll, threads) for unroll, threads in ((1, 128), (2, 128), (2, 256))]
    return list(dict.fromkeys([default, replace(default, load="load_once"), *others]))


@functools.cache
def gen_rope(
    mode: str,
    dtype: str,
    rotary_dim: int,
    interleave: bool,
    num_heads: int,
    vec: int | None = None,
    config: RopeConfig | None = None,
) -> JitSpec:
    """The kernel for a rotary dimension.

    Parameters
    ----------
    mode
        One of `MODES`.
    dtype
        "float16", "bfloat16" or "float32".
    num_heads
        Heads of q and k together (decides the block's shape).
    vec
        Elements per access; default: what rotary_dim allows if pointers and strides are multiples of 16 bytes.
    config
        One of `rope_candidates`, default `rope_config`.
    """
    if mode not in MODES:
        fail("gen_rope", "mode", "is unknown", repr(mode), "one of " + ", ".join(MODES))
    d = canonical_dtype(dtype)
    pairs = rotary_dim // 2
    v = vec or min(16 // d.itemsize, pairs & -pairs)
    config = config or rope_config(pairs // v, num_heads)
    constants = (
        ("scalar_t", d.ctype),
        ("MODE", mode),
        ("VEC", v),
        ("PAIRS", pairs),
        ("HEADS", config.heads),
        ("UNROLL", config.unroll),
        ("INTERLEAVE", interleave),
        ("LOAD", config.load),
    )
    name = f"rope_{mode}_{d.short}_d{rotary_dim}_v{v}_{config.short}{'_interleave' if interleave else ''}"
    block = (pairs // v, config.heads, 1)
    return JitSpec(name, "rope/rope.cu.jinja", rope_params(mode, pairs), constants, block=block)


@functools.cache
def rope_quantize_params(append: bool) -> ParamStruct:
    """The parameter struct of rope_quantize: keys go to tensors of their own, or with values into a paged cache."""

    def strides(name: str, *axes: str) -> tuple[Field, ...]:
        return tuple(i64(f"{name}_stride_{axis}", "elements") for axis in axes)

    inputs = ("q_rope", "k_rope", "q_nope", "k_nope", *(("v",) if append else ()))
    q_outputs = ("q_rope_out", "q_nope_out")
    k_outputs = ("k_rope_out", "k_nope_out", *(("v_out",) if append else ()))
    where = "[pages, page_size, heads, dim] in any order of axes" if append else "[tokens, heads, dim]"
    return ParamStruct(
        "RopeQuantizeAppendParams" if append else "RopeQuantizeParams",
        *(ptr(name, "const scalar_t", "[tokens, heads, dim]") for name in inputs),
        *(ptr(name, "out_t", "[tokens, heads, dim]") for name in q_outputs),
        *(ptr(name, "out_t", where) for name in k_outputs),
        ptr("cos_sin_cache", "const float", "[max_position, 2 * PAIRS]: cosines, then sines"),
        ptr("pos_ids", "const void", "[tokens]"),
        *(PLACES if append else ()),
        *(f for name in (*inputs, *q_outputs) for f in strides(name, "n", "h")),
        *(f for name in k_outputs for f in strides(name, *(("page", "slot", "h") if append else ("n", "h")))),
        i64("cache_stride", "elements"),
        i64("max_position"),
        *((i64("num_indices"), i64("num_pages")) if append else ()),
        u32("num_q_heads"),
        u32("num_kv_heads"),
        u32("q_nope_heads", "0: the queries' other elements stay where they are"),
        u32("parts", "blocks per token"),
        u32("rotate_parts", "those of them that rotate; the others move what is not rotated"),
        i32("wide", "bit per index array: int64"),
        *((i32("batch"), u32("page_size")) if append else ()),
        f32("q_scale", "what queries are multiplied by"),
        f32("kv_scale", "what keys and values are multiplied by"),
    )


COPIES = 4
"""Chunks of what is not rotated that a thread of rope_quantize moves."""


def rotary_blocks(
    heads: tuple[int, int, int], pairs: int, nope: int, value: int, vec: int, config: RopeConfig
) -> tuple[int, int]:
    """Blocks per token, and those of them that rotate. `heads` are those of queries, of keys, and of queries that have elements to copy."""
    q_heads, kv_heads, q_nope_heads = heads
    rotate = -(-(q_heads + kv_heads) // (config.heads * config.unroll))
    chunks = ((q_nope_heads + kv_heads) * nope + kv_heads * value) // vec
    return rotate + -(-chunks // (pairs // vec * config.heads * COPIES)), rotate


@functools.cache
def gen_rope_quantize(
    dtype: str,
    out: str,
    rotary_dim: int,
    nope: int,
    interleave: bool = False,
    append: bool = False,
    value: int = 0,
    vec: int | None = None,
    config: RopeConfig | None = None,
    num_heads: int = 40,
) -> JitSpec:
    """The kernel that rotates by a table and rounds.

    Parameters
    ----------
    dtype, out
        Of the inputs ("float16", "bfloat16", "float32"), of the results (an 8-bit float, or dtype).
    rotary_dim, nope
        Elements of a head that are rotated, and that are not.
    append, value
        Whether keys go into a paged cache, and elements of a value that does with them (0: none).
    vec
        Elements per access; default: what the dimensions allow if pointers and strides are multiples of 16 bytes.
    config
        One of `rope_candidates`; default `rope_config` for `num_heads` of queries and keys.
    """
    d, o = canonical_dtype(dtype), canonical_dtype(out)
    pairs = rotary_dim // 2
    dims = pairs | nope | value
    v = vec or min(16 // d.itemsize, dims & -dims)
    config = config or rope_config(pairs // v, num_heads)
    constants = (
        ("scalar_t", d.ctype),
        ("out_t", o.ctype),
        ("VEC", v),
        ("HEADS", config.heads),
        ("UNROLL", config.unroll),
        ("COPIES", COPIES),
        ("LOAD", config.load),
        ("PAIRS", pairs),
        ("NOPE", nope),
        ("VALUE", value),
        ("INTERLEAVE", interleave),
        ("APPEND", append),
        ("SCALED", d is not o),
    )
    where = f"_append_v{value}" if append else ""
    shape = f"{config.short}{'_interleave' if interleave else ''}"
    name = f"rope_quantize_{d.short}_{o.short}_r{rotary_dim}_n{nope}{where}_v{v}_{shape}"
    template, block = "rope/rope_quantize.cu.jinja", (pairs // v, config.heads, 1)
    return JitSpec(name, template, rope_quantize_params(append), constants, block=block)


@functools.cache
def gen_rope_module() -> JitModule:
    """Every mode in float16 and bfloat16 for heads of 64 (SmolLM2's 9 + 3) and 128 (Llama 3 8B's 32 + 8)."""
    shapes = ((64, 12), (128, 40))
    specs = [
        gen_rope(m, d, rd, inter, h)
        for m in MODES
        for d in ("float16", "bfloat16")
        for rd, h in shapes
        for inter in (False, True)
    ]
    return JitModule("rope", tuple(dict.fromkeys(specs)))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    specs = [gen_rope(m, "bfloat16", rd, False, h) for m in MODES for rd, h in ((64, 12), (128, 40))]
    specs += [gen_rope(m, "float16", 128, True, 40) for m in MODES]
    specs += [
        gen_rope("pos_ids", "float32", 96, True, 8),
        gen_rope("pos_ids", "float16", 6, False, 3),
        gen_rope("pos_ids", "bfloat16", 256, False, 2),
    ]
    specs += [
        gen_rope(m, "bfloat16", 128, False, 40, config=c) for m in ("pos_ids", "cache") for c in rope_candidates(8, 40)
    ]
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    specs += [
        gen_rope_quantize("bfloat16", e4m3, 64, 512, num_heads=129),  # MLA
        gen_rope_quantize("bfloat16", e4m3, 64, 512, append=True, num_heads=129),
        gen_rope_quantize("bfloat16", e4m3, 128, 0, append=True, value=128),  # Llama 3
        gen_rope_quantize("float16", e5m2, 64, 64, True, append=True, value=128),
        gen_rope_quantize("float16", e4m3, 6, 3),
        gen_rope_quantize("bfloat16", "bfloat16", 128, 0, append=True, value=128),
        gen_rope_quantize("float16", "float16", 32, 32, True, append=True, value=64),
        gen_rope_quantize("float32", "float32", 64, 0, append=True, value=64),
        *(
            gen_rope_quantize("bfloat16", "bfloat16", 128, 0, append=True, value=128, config=c)
            for c in rope_candidates(8, 40)
        ),
    ]
    return list(dict.fromkeys(specs))
