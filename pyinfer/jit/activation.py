"""Specs of the gated activations."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, u32
from pyinfer.jit.norm import RowConfig, row_config
from pyinfer.jit.spec import JitModule, JitSpec

_SCALE = {
    "": (),
    "tensor": (ptr("scale", "const float", "[1], or null: scale_value"),),
    "row": (ptr("scales", "float", "[rows]: written"),),
}


@functools.cache
def act_params(quantize: str = "") -> ParamStruct:
    """The parameter struct, with results of one kind (`pyinfer.jit.norm.QUANTIZE`)."""
    x = "[rows, 2 * width], row r at (r / inner) * x_outer + (r % inner) * x_inner: gate, then factor"
    return ParamStruct(
        "ActAndMulParams",
        ptr("x", "const scalar_t", x),
        ptr("out", "out_t", "[rows, width]"),
        *_SCALE[quantize],
        i64("x_outer", "strides in elements"),
        i64("x_inner"),
        i64("out_outer"),
        i64("out_inner"),
        u32("rows"),
        u32("inner", ">= 1"),
        *((u32("chunks", "blocks per row"),) if quantize != "row" else ()),
        i32("width", "a multiple of VEC"),
        *((f32("scale_value"),) if quantize == "tensor" else ()),
    )


act_func_def_str: dict[str, str] = {
    "silu": '#include "activation/silu.cuh"',
    "gelu": '#include "activation/gelu.cuh"',
    "gelu_tanh": '#include "activation/gelu_tanh.cuh"',
}
"""Name → CUDA text that defines `float activation(float x)`."""


@dataclass(frozen=True)
class ActConfig:
    """How rows are spread over threads and read.

    Attributes
    ----------
    lanes, rows
        Threads per row part, rows per block.
    unroll
        Vectors of each half per thread.
    chunks
        Row parts, one block each.
    load, store
        Access functions of `cuda_src/common/vec_io.cuh`.
    """

    lanes: int
    rows: int
    unroll: int
    chunks: int
    load: str = "load_once"
    store: str = "store"

    @property
    def short(self) -> str:
        """What tells it apart in a kernel's name, but for lanes and rows."""
        load, store = self.load.removeprefix("load"), self.store.removeprefix("store")
        return f"u{self.unroll}{load}{store and '_write' + store}"


def _blocks(act: str, config: ActConfig) -> int:
    """Blocks that a multiprocessor should hold: 1536 threads of 40 registers, if the block's size lets it. erf needs more registers."""
    return 1 if act == "gelu" else max(1, min(32, 1536 // (config.lanes * config.rows)))


def _spread(vectors: int, threads: int, unroll: int, load: str = "load_once", store: str = "store") -> ActConfig:
    """Parts of equal size, of at most `threads` threads with `unroll` vectors each."""
    chunks = -(-vectors // (threads * unroll))
    return ActConfig(32 * -(-vectors // (32 * unroll * chunks)), 1, unroll, chunks, load, store)


def act_config(vectors: int) -> ActConfig:
    """How a row of `vectors` accesses is spread: rows that a warp holds share a block, longer ones take parts of equal size.

    One vector of each half per thread and up to 512 threads a part: what is in flight comes from many warps, not from many loads of one, and neighbouring
    blocks work on neighbouring memory. Measured on an H200 (tools/gpu/time_ops.py, copy 4.26 TB/s): 16384 rows of 8192 at 4.39 TB/s (past the L1 cache: 3.97),
    4096 rows of 4096 at 4.03 TB/s past the L1 cache (through it: 3.94).
    """
    if vectors <= 64:
        lanes = min(32, 1 << max(0, vectors - 1).bit_length())
        return ActConfig(lanes, 128 // lanes, -(-vectors // lanes), 1)
    return _spread(vectors, 512, 1, "load_once" if vectors <= 512 else "load")


def act_candidates(vectors: int) -> list[ActConfig]:
    """Configurations worth timing for long rows, the default first (tools/gpu/time_ops.py)."""
    found = [act_config(vectors)]
    if vectors > 64:
        for threads, unroll, load, store in (
            (512, 1, "load", "store"),
            (1024, 1, "load", "store"),
            (512, 1, "load_once", "store"),
            (512, 1, "load", "store_stream"),
            (512, 1, "load_stream", "store_stream"),
            (256, 1, "load", "store"),
            (256, 2, "load_once", "store"),
            (256, 2, "load_stream", "store_stream"),
        ):
            found.append(_spread(vectors, threads, unroll, load, store))
    return list(dict.fromkeys(found))


@functools.cache
def gen_act_and_mul(
    act: str,
    dtype: str,
    width: int,
    vec: int | None = None,
    config: ActConfig | None = None,
    out: str | None = None,
) -> JitSpec:
    """The kernel for rows of `width` results (and others that share its configuration).

    Parameters
    ----------
    act
        A name in `act_func_def_str`.
    dtype
        "float16", "bfloat16" or "float32".
    vec
        Elements per access; default: what `width` allows if pointers and strides are multiples of 16 bytes.
    config
        One of `act_candidates`; default `act_config`.
    out
        The 8-bit dtype of results divided by one scale; None: they are of `dtype`.
    """
    if act not in act_func_def_str:
        fail("gen_act_and_mul", "act", "is unknown", repr(act), "one of " + ", ".join(act_func_def_str))
    d = canonical_dtype(dtype)
    v = vec or min(16 // d.itemsize, width & -width)
    config = config or act_config(width // v)
    o = canonical_dtype(out or dtype)
    constants = (
        ("scalar_t", d.ctype),
        ("out_t", o.ctype),
        ("QUANTIZE", out is not None),
        ("VEC", v),
        ("LANES", config.lanes),
        ("ROWS", config.rows),
        ("UNROLL", config.unroll),
        ("BLOCKS", _blocks(act, config)),
        ("LOAD", config.load),
        ("STORE", config.store),
        ("activation", act_func_def_str[act]),
    )
    result = f"_{o.short}" if out else ""
    name = f"{act}_and_mul_{d.short}{result}_v{v}_{config.lanes}x{config.rows}_{config.short}"
    return JitSpec(
        name,
        "activation/act_and_mul.cu.jinja",
        act_params("tensor" if out else ""),
        constants,
        block=(config.lanes, config.rows, 1),
    )


def act_rows_config(vectors: int) -> RowConfig:
    """How a row is spread that one block must see whole: two vectors of results a thread, kept as floats."""
    return row_config(vectors, 2, (512, 6))


@functools.cache
def gen_act_and_mul_rows(act: str, dtype: str, out: str, width: int, vec: int | None = None) -> JitSpec:
    """The kernel whose results are divided by a scale of each row's own; parameters as `gen_act_and_mul`."""
    if act not in act_func_def_str:
        fail("gen_act_and_mul_rows", "act", "is unknown", repr(act), "one of " + ", ".join(act_func_def_str))
    d, o = canonical_dtype(dtype), canonical_dtype(out)
    v = vec or min(16 // d.itemsize, width & -width)
    config = act_rows_config(width // v)
    constants = (
        ("scalar_t", d.ctype),
        ("out_t", o.ctype),
        ("VEC", v),
        ("LANES", config.lanes),
        ("ROWS", config.rows),
        ("SLOTS", config.slots),
        ("REREAD", config.reread),
        ("activation", act_func_def_str[act]),
    )
    name = f"{act}_and_mul_{d.short}_{o.short}_rows_v{v}_{config.short}"
    template = "activation/act_and_mul_rows.cu.jinja"
    return JitSpec(name, template, act_params("row"), constants, block=(config.lanes, config.rows, 1))


_WIDTHS = (1536, 8192, 14336)  # SmolLM2, Llama 3 1B, 8B


@functools.cache
def gen_act_and_mul_module(act_func_name: str) -> JitModule:
    """The kernels of one activation for the usual widths in float16 and bfloat16."""
    specs = [gen_act_and_mul(act_func_name, d, w) for d in ("float16", "bfloat16") for w in _WIDTHS]
    return JitModule(f"{act_func_name}_and_mul", tuple(dict.fromkeys(specs)))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    specs = [spec for act in act_func_def_str for spec in gen_act_and_mul_module(act).specs]
    specs += [
        gen_act_and_mul("silu", "float32", 1536),
        gen_act_and_mul("gelu", "bfloat16", 4),
        gen_act_and_mul("gelu_tanh", "float16", 4096, 1),
        *(gen_act_and_mul("silu", "bfloat16", 8192, config=c) for c in act_candidates(1024)),
        *(gen_act_and_mul(a, "bfloat16", 14336, out="float8_e4m3fn") for a in act_func_def_str),
        gen_act_and_mul("silu", "float16", 20, out="float8_e5m2"),
        *(gen_act_and_mul_rows(a, "bfloat16", "float8_e4m3fn", 14336) for a in act_func_def_str),
        *(gen_act_and_mul_rows("silu", "bfloat16", "float8_e4m3fn", w) for w in (1536, 8192, 65536)),
        gen_act_and_mul_rows("silu", "float32", "float8_e5m2", 4096),
        gen_act_and_mul_rows("silu", "float16", "float8_e4m3fn", 8, 1),
    ]
    return list(dict.fromkeys(specs))
