"""Specs of the normalisation kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit import qk_norm_rope
from pyinfer.jit.spec import JitModule, JitSpec

QUANTIZE = ("", "tensor", "row")
"""What 8-bit results are divided by: nothing (they are none), one scale that the caller gives, or each row's own, which the kernel writes."""

_ROWS = (
    u32("rows"),
    u32("inner", ">= 1"),
    i32("hidden", "a multiple of VEC"),
    f32("inv_hidden", "1 / hidden"),
    f32("eps"),
)
_X = ptr(
    "x", "const scalar_t", "[rows, hidden], row r at (r / inner) * x_outer + (r % inner) * x_inner, strides in elements"
)
_SCALE = {
    "": (),
    "tensor": (ptr("scale", "const float", "[1], or null: scale_value"),),
    "row": (ptr("scales", "float", "[rows]: written"),),
}


def _strides(*names: str) -> tuple[Field, ...]:
    return tuple(i64(f"{name}_{axis}") for name in names for axis in ("outer", "inner"))


def _value(quantize: str) -> tuple[Field, ...]:
    return (f32("scale_value"),) if quantize == "tensor" else ()


@functools.cache
def rmsnorm_params(quantize: str = "") -> ParamStruct:
    """The parameter struct of rmsnorm with results of one kind."""
    pointers = (_X, ptr("weight", "const scalar_t", "[hidden]"), ptr("out", "out_t", "as x; may be x"))
    return ParamStruct("RMSNormParams", *pointers, *_SCALE[quantize], *_strides("x", "out"), *_ROWS, *_value(quantize))


@functools.cache
def fused_add_params(quantize: str = "") -> ParamStruct:
    """The parameter struct of fused_add_rmsnorm: x becomes the result, or there is an `out` of 8-bit floats."""
    residual = ptr("residual", "scalar_t", "as x; becomes x + residual")
    weight = ptr("weight", "const scalar_t", "[hidden]")
    if not quantize:
        x = ptr("x", "scalar_t", _X.doc + "; becomes the result")
        return ParamStruct("FusedAddRMSNormParams", x, residual, weight, *_strides("x", "residual"), *_ROWS)
    out = (ptr("out", "out_t", "as x"), *_SCALE[quantize], *_strides("x", "residual", "out"))
    return ParamStruct("FusedAddRMSNormQuantParams", _X, residual, weight, *out, *_ROWS, *_value(quantize))


LAYERNORM = ParamStruct(
    "LayerNormParams",
    _X,
    ptr("weight", "const param_t", "[hidden]"),
    ptr("bias", "const param_t", "[hidden]"),
    ptr("out", "scalar_t", "as x; may be x"),
    *_strides("x", "out"),
    *_ROWS,
)


@dataclass(frozen=True)
class RowConfig:
    """How a row is spread over threads.

    Attributes
    ----------
    lanes
        Threads per row.
    rows
        Rows per block.
    slots
        Vectors of its row a thread keeps in registers.
    reread
        Whether the row has more vectors than lanes * slots.
    load, store
        Access functions of `cuda_src/common/vec_io.cuh`.
    blocks
        Blocks that a multiprocessor should hold (bounds the registers); 1: as the compiler likes.
    """

    lanes: int
    rows: int
    slots: int
    reread: bool
    load: str = "load_once"
    store: str = "store"
    blocks: int = 1

    @property
    def short(self) -> str:
        """What tells it apart in a kernel's name."""
        access = f"{'' if self.load == 'load_once' else '_read' + self.load.removeprefix('load')}{self.store.removeprefix('store') and '_write_stream'}"
        more = f"_b{self.blocks}" if self.blocks > 1 else ""
        return f"{self.lanes}x{self.rows}_s{self.slots}{access}{more}{'_reread' if self.reread else ''}"

    def grid(self, rows: int) -> int:
        """Blocks to launch for that many rows."""
        return -(-rows // self.rows)


def row_config(vectors: int, slots: int, longest: tuple[int, int]) -> RowConfig:
    """The one place where the shape of a row kernel is decided.

    Up to 128 vectors a row belongs to (part of) a warp and needs no barrier. Longer rows take as many warps as hold them at `slots` vectors a thread, so that
    every thread has several 16-byte loads in flight and several blocks share a multiprocessor: while one reduces, others load. Where that takes more than 1024
    threads, `longest` says how much of a row is kept; the rest of it is read twice.

    Parameters
    ----------
    vectors
        Accesses per row: hidden / VEC.
    slots
        Vectors per thread to aim at.
    longest
        (lanes, slots) for rows that 1024 threads do not hold: the most that compiles without spills.
    """
    if vectors <= 128:
        lanes = min(32, 1 << max(0, vectors - 1).bit_length())
        return RowConfig(lanes, 128 // lanes, max(1, -(-vectors // lanes)), False)
    lanes = 32 * -(-vectors // (32 * slots))
    if lanes <= 1024:
        return RowConfig(lanes, 1, slots, False)
    lanes, slots = longest
    return RowConfig(lanes, 1, slots, vectors > lanes * slots)


def _constants(
    dtype: DType, vec: int, config: RowConfig, gemma: bool, quantize: str, out: DType
) -> tuple[tuple[str, object], ...]:
    return (
        ("scalar_t", dtype.ctype),
        ("out_t", out.ctype),
        ("QUANTIZE", quantize),
        ("VEC", vec),
        ("LANES", config.lanes),
        ("ROWS", config.rows),
        ("SLOTS", config.slots),
        ("BLOCKS", config.blocks),
        ("REREAD", config.reread),
        ("LOAD", config.load),
        ("STORE", config.store),
        ("WEIGHT_BIAS", "1.0" if gemma else "0.0"),
    )


def _name(op: str, dtype: DType, vec: int, config: RowConfig, gemma: bool, quantize: str, out: DType) -> str:
    result = f"_{out.short}_{quantize}" if quantize else ""
    return f"{'gemma_' if gemma else ''}{op}_{dtype.short}{result}_v{vec}_{config.short}"


def _vec(dtype: DType, hidden: int, vec: int | None) -> int:
    """Elements per access for aligned tensors, unless the caller knows better."""
    if vec is not None:
        return vec
    widest = 16 // dtype.itemsize
    return min(widest, hidden & -hidden)


def _result(quantize: str, dtype: DType, out: str | None) -> DType:
    if quantize not in QUANTIZE:
        fail("gen_rmsnorm", "quantize", "is unknown", repr(quantize), "one of " + ", ".join(map(repr, QUANTIZE)))
    return canonical_dtype(out or "float8_e4m3fn") if quantize else dtype


def rmsnorm_config(vectors: int) -> RowConfig:
    """Four vectors a thread; long rows through the L1 cache, with registers for 1024 threads a multiprocessor.

    Measured on an H200 (tools/gpu/time_ops.py, copy 4.26 TB/s) at 16384 x 8192: 130.8 us, 96% of the copy (two vectors a thread the same; past the
    L1 cache: 137.0; one vector: 169.8).
    """
    config = row_config(vectors, 4, (512, 8))
    if not 128 < vectors <= 4096 or config.reread:
        return config
    return replace(config, load="load" if vectors > 512 else config.load, blocks=max(1, 1024 // config.lanes))


def rmsnorm_candidates(vectors: int) -> list[RowConfig]:
    """Configurations worth timing for long rows, the default first (tools/gpu/time_ops.py).

    What they try: fewer vectors a thread and more threads (what is in flight then comes from many warps), reads through L1 or past it, a bound on
    registers so that more blocks share a multiprocessor.
    """
    found = [rmsnorm_config(vectors)]
    if 128 < vectors <= 1024:
        for slots, load, threads in ((4, "load", 1024), (4, "load_once", 1024), (2, "load", 1536)):
            config = row_config(vectors, slots, (1024, 4))
            found.append(replace(config, load=load, blocks=max(1, threads // (config.lanes * config.rows))))
    return list(dict.fromkeys(found))


@functools.cache
def gen_rmsnorm(
    dtype: str,
    hidden: int,
    vec: int | None = None,
    gemma: bool = False,
    quantize: str = "",
    out: str | None = None,
    silu: bool = False,
    config: RowConfig | None = None,
) -> JitSpec:
    """The rmsnorm kernel for rows of `hidden` elements (and others that share its configuration).

    Parameters
    ----------
    dtype
        "float16", "bfloat16" or "float32".
    vec
        Elements per access; default: what `hidden` allows if pointers and strides are multiples of 16 bytes.
    gemma
        Multiply by weight + 1.
    quantize, out
        One of `QUANTIZE`, and the 8-bit type of the results.
    silu
        Pass the results through x / (1 + exp(-x)).
    config
        One of `rmsnorm_candidates`, default `rmsnorm_config`.
    """
    d = canonical_dtype(dtype)
    o = _result(quantize, d, out)
    v = _vec(d, hidden, vec)
    config = config or rmsnorm_config(hidden // v)
    name = _name("rmsnorm_silu" if silu else "rmsnorm", d, v, config, gemma, quantize, o)
    constants = (*_constants(d, v, config, gemma, quantize, o), ("SILU", silu))
    block = (config.lanes, config.rows, 1)
    params = rmsnorm_params(quantize)
    return JitSpec(name, "norm/rmsnorm.cu.jinja", params, constants, block=block)


def fused_add_config(vectors: int) -> RowConfig:
    """One vector a thread, through the L1 cache; rows that a block of 1024 cannot hold so take two or eight.

    Measured on an H200 (tools/gpu/time_ops.py, copy 4.26 TB/s) at 16384 x 8192: 260.6 us, 97% of the copy; two vectors a thread: 270.2.
    """
    if 128 < vectors <= 1024:
        return replace(row_config(vectors, 1, (1024, 4)), load="load")
    return row_config(vectors, 2, (512, 6))


def fused_add_candidates(vectors: int) -> list[RowConfig]:
    """Configurations worth timing for long rows, the default first (tools/gpu/time_ops.py)."""
    found = [fused_add_config(vectors)]
    if vectors > 128:
        for slots, load, store in (
            (2, "load_once", "store"),
            (2, "load", "store"),
            (2, "load_stream", "store_stream"),
            (1, "load_once", "store"),
            (1, "load", "store_stream"),
        ):
            found.append(replace(row_config(vectors, slots, (1024, 4)), load=load, store=store))
    return list(dict.fromkeys(found))


@functools.cache
def gen_fused_add_rmsnorm(
    dtype: str,
    hidden: int,
    vec: int | None = None,
    gemma: bool = False,
    quantize: str = "",
    out: str | None = None,
    config: RowConfig | None = None,
) -> JitSpec:
    """The fused_add_rmsnorm kernel; parameters as `gen_rmsnorm`. `config`: one of `fused_add_candidates`, default `fused_add_config`."""
    d = canonical_dtype(dtype)
    o = _result(quantize, d, out)
    v = _vec(d, hidden, vec)
    config = config or fused_add_config(hidden // v)
    name = _name("fused_add_rmsnorm", d, v, config, gemma, quantize, o)
    return JitSpec(
        name,
        "norm/fused_add_rmsnorm.cu.jinja",
        fused_add_params(quantize),
        _constants(d, v, config, gemma, quantize, o),
        block=(config.lanes, config.rows, 1),
    )


def layernorm_config(vectors: int) -> RowConfig:
    """As rmsnorm. One barrier a row instead of two took registers and was slower: docs/design/memory_bound.md."""
    return rmsnorm_config(vectors)


@functools.cache
def gen_layernorm(dtype: str, param_dtype: str, hidden: int, vec: int | None = None) -> JitSpec:
    """The layernorm kernel for rows of `hidden` elements; `param_dtype` is the weight's and the bias's."""
    d, param = canonical_dtype(dtype), canonical_dtype(param_dtype)
    v = _vec(d, hidden, vec)
    config = layernorm_config(hidden // v)
    constants = (
        ("scalar_t", d.ctype),
        ("param_t", param.ctype),
        ("VEC", v),
        ("LANES", config.lanes),
        ("ROWS", config.rows),
        ("SLOTS", config.slots),
        ("BLOCKS", config.blocks),
        ("LOAD", config.load),
        ("REREAD", config.reread),
    )
    name = f"layernorm_{d.short}_{param.short}_v{v}_{config.short}"
    block = (config.lanes, config.rows, 1)
    return JitSpec(name, "norm/layernorm.cu.jinja", LAYERNORM, constants, block=block)


# SmolLM2, a head of 128, Llama 3 8B and 70B; one of odd length, one that is read twice.
_HIDDEN = (128, 576, 4096, 8192)


@functools.cache
def gen_norm_module() -> JitModule:
    """Every normalisation kernel for the usual hidden sizes in float16 and bfloat16."""
    specs = [
        gen(dtype, hidden, gemma=gemma)
        for gen in (gen_rmsnorm, gen_fused_add_rmsnorm)
        for dtype in ("float16", "bfloat16")
        for hidden in _HIDDEN
        for gemma in (False, True)
    ]
    return JitModule("norm", tuple(dict.fromkeys(specs)))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests: each shape of row at least once."""
    specs = [
        gen(d, h) for gen in (gen_rmsnorm, gen_fused_add_rmsnorm) for d in ("float16", "bfloat16") for h in _HIDDEN
    ]
    for gen in (gen_rmsnorm, gen_fused_add_rmsnorm):
        specs += [
            gen("bfloat16", 4096, gemma=True),
            gen("float16", 111),
            gen("bfloat16", 65536),
            gen("float32", 4096),
            gen("float16", 65535),
        ]
        specs += [gen("bfloat16", h, quantize=q) for q in ("tensor", "row") for h in (128, 4096, 8192, 65536)]
        specs += [
            gen("float16", 4096, quantize="row", out="float8_e5m2"),
            gen("float16", 111, quantize="tensor", out="float8_e5m2"),
            gen("float32", 4096, quantize="row"),
        ]
    specs += [gen_fused_add_rmsnorm("bfloat16", 8192, config=c) for c in fused_add_candidates(1024)]
    specs += [gen_rmsnorm("bfloat16", 8192, config=c) for c in rmsnorm_candidates(1024)]
    specs += [
        gen_rmsnorm("bfloat16", 8192, quantize=q, config=c) for q in QUANTIZE[1:] for c in rmsnorm_candidates(1024)
    ]
    specs += [gen_rmsnorm("bfloat16", 1024, silu=True), gen_rmsnorm("bfloat16", 1024, silu=True, quantize="tensor")]
    specs += [gen_layernorm(d, "float32", h) for d in ("bfloat16", "float16") for h in _HIDDEN]
    specs += [
        gen_layernorm("bfloat16", "bfloat16", 4096),
        gen_layernorm("float32", "float32", 4096),
        gen_layernorm("float16", "float32", 111),
        gen_layernorm("bfloat16", "float32", 65536),
    ]
    return list(dict.fromkeys([*specs, *qk_norm_rope.specs()]))
