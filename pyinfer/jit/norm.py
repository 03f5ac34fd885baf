"""Specs of the normalisation kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit.spec import JitModule, JitSpec

RMSNORM = ParamStruct(
    "RMSNormParams",
    ptr("x", "const scalar_t", "[rows, hidden], row r at (r / inner) * x_outer + (r % inner) * x_inner"),
    ptr("weight", "const scalar_t", "[hidden]"),
    ptr("out", "scalar_t", "as x; may be x"),
    i64("x_outer", "strides in elements"),
    i64("x_inner"),
    i64("out_outer"),
    i64("out_inner"),
    u32("rows"),
    u32("inner", ">= 1"),
    i32("hidden", "a multiple of VEC"),
    f32("inv_hidden", "1 / hidden"),
    f32("eps"),
)

FUSED_ADD_RMSNORM = ParamStruct(
    "FusedAddRMSNormParams",
    ptr("x", "scalar_t", "[rows, hidden], row r at (r / inner) * x_outer + (r % inner) * x_inner; becomes the result"),
    ptr("residual", "scalar_t", "as x; becomes x + residual"),
    ptr("weight", "const scalar_t", "[hidden]"),
    i64("x_outer", "strides in elements"),
    i64("x_inner"),
    i64("residual_outer"),
    i64("residual_inner"),
    u32("rows"),
    u32("inner", ">= 1"),
    i32("hidden", "a multiple of VEC"),
    f32("inv_hidden", "1 / hidden"),
    f32("eps"),
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
    early_bytes
        Weights are loaded before the reduction if a thread's take at most that.
    """

    lanes: int
    rows: int
    slots: int
    reread: bool
    load: str = "load_once"
    store: str = "store"
    early_bytes: int = 0

    @property
    def short(self) -> str:
        """What tells it apart in a kernel's name."""
        access = f"{'' if self.load == 'load_once' else '_read' + self.load.removeprefix('load')}{self.store.removeprefix('store') and '_write_stream'}"
        early = f"_w{self.early_bytes}" if self.early_bytes else ""
        return f"{self.lanes}x{self.rows}_s{self.slots}{access}{early}{'_reread' if self.reread else ''}"


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


def _constants(dtype: DType, vec: int, config: RowConfig, gemma: bool) -> tuple[tuple[str, object], ...]:
    return (
        ("scalar_t", dtype.ctype),
        ("VEC", vec),
        ("LANES", config.lanes),
        ("ROWS", config.rows),
        ("SLOTS", config.slots),
        ("REREAD", config.reread),
        ("WEIGHT_BIAS", "1.0" if gemma else "0.0"),
    )


def _name(op: str, dtype: DType, vec: int, config: RowConfig, gemma: bool) -> str:
    return f"{'gemma_' if gemma else ''}{op}_{dtype.short}_v{vec}_{config.short}"


def _vec(dtype: DType, hidden: int, vec: int | None) -> int:
    """Elements per access for aligned tensors, unless the caller knows better."""
    if vec is not None:
        return vec
    widest = 16 // dtype.itemsize
    return min(widest, hidden & -hidden)


@functools.cache
def gen_rmsnorm(dtype: str, hidden: int, vec: int | None = None, gemma: bool = False) -> JitSpec:
    """The rmsnorm kernel for rows of `hidden` elements (and others that share its configuration).

    Parameters
    ----------
    dtype
        "float16", "bfloat16" or "float32".
    vec
        Elements per access; default: what `hidden` allows if pointers and strides are multiples of 16 bytes.
    gemma
        Multiply by weight + 1.
    """
    d = canonical_dtype(dtype)
    v = _vec(d, hidden, vec)
    config = row_config(hidden // v, 4, (512, 12))
    name = _name("rmsnorm", d, v, config, gemma)
    return JitSpec(
        name, "norm/rmsnorm.cu.jinja", RMSNORM, _constants(d, v, config, gemma), block=(config.lanes, config.rows, 1)
    )


def fused_add_config(vectors: int) -> RowConfig:
    """One vector a thread, through the L1 cache, the weights loaded early; rows that a block of 1024 cannot hold so take two and four.

    Measured on an H200 (tools/gpu/time_ops.py, copy 4.26 TB/s) at 16384 x 8192: 260.6 us, 97% of the copy; two vectors a thread: 270.2.
    """
    if 128 < vectors <= 1024:
        return replace(row_config(vectors, 1, (1024, 4)), load="load", early_bytes=16)
    return row_config(vectors, 2, (1024, 4))


def fused_add_candidates(vectors: int) -> list[RowConfig]:
    """Configurations worth timing for long rows, the default first (tools/gpu/time_ops.py)."""
    found = [fused_add_config(vectors)]
    if vectors > 128:
        for slots, load, store, early in (
            (2, "load_once", "store", 0),
            (2, "load_once", "store", 32),
            (2, "load", "store", 0),
            (2, "load_once", "store_stream", 0),
            (2, "load_stream", "store_stream", 0),
            (1, "load_once", "store", 16),
            (1, "load", "store", 16),
            (4, "load_once", "store", 0),
        ):
            config = row_config(vectors, slots, (1024, 4))
            found.append(replace(config, load=load, store=store, early_bytes=early))
    return list(dict.fromkeys(found))


@functools.cache
def gen_fused_add_rmsnorm(
    dtype: str, hidden: int, vec: int | None = None, gemma: bool = False, config: RowConfig | None = None
) -> JitSpec:
    """The fused_add_rmsnorm kernel; parameters as `gen_rmsnorm`. `config`: one of `fused_add_candidates`, default `fused_add_config`."""
    d = canonical_dtype(dtype)
    v = _vec(d, hidden, vec)
    config = config or fused_add_config(hidden // v)
    name = _name("fused_add_rmsnorm", d, v, config, gemma)
    access = (("LOAD", config.load), ("STORE", config.store), ("EARLY_BYTES", config.early_bytes))
    return JitSpec(
        name,
        "norm/fused_add_rmsnorm.cu.jinja",
        FUSED_ADD_RMSNORM,
        _constants(d, v, config, gemma) + access,
        block=(config.lanes, config.rows, 1),
    )


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
    specs += [gen_fused_add_rmsnorm("bfloat16", 8192, config=c) for c in fused_add_candidates(1024)]
    specs += [gen_fused_add_rmsnorm("bfloat16", 8192, config=c) for c in fused_add_candidates(1024)]
    return list(dict.fromkeys(specs))
