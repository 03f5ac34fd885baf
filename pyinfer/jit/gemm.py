"""Specs of matrix products."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import ParamStruct, i32, i64, ptr
from pyinfer.jit.spec import JitModule, JitSpec

TINYGEMM = ParamStruct(
    "TinyGemmParams",
    ptr("x", "const scalar_t", "[rows, depth]"),
    ptr("weight", "const scalar_t", "[columns, depth]"),
    ptr("out", "out_t", "[rows, columns]"),
    ptr("bias", "const scalar_t", "[columns] or null"),
    i64("x_stride", "elements from row to row"),
    i64("weight_stride"),
    i64("out_stride"),
    i32("rows"),
    i32("columns"),
    i32("depth", "a multiple of 8"),
)
WARPS = 4
MAX_ROWS = 8
MAX_CHUNKS = 8
ROW_CLASSES = (1, 2, 4, MAX_ROWS)


def tinygemm_shape(rows: int, depth: int) -> tuple[int, int]:
    """(rows a warp handles, loads in flight) for a product."""
    tile = next((r for r in ROW_CLASSES if r >= rows), MAX_ROWS)
    return tile, max(
        1, min(MAX_CHUNKS if tile < MAX_ROWS else 6, -(-depth // 256))
    )  # NOTE: eight would spill on sm_100


@functools.cache
def gen_tinygemm(dtype: str, rows: int, chunks: int, out_dtype: str | None = None) -> JitSpec:
    """The kernel for x and weight in `dtype`.

    Parameters
    ----------
    rows, chunks
        From `tinygemm_shape`.
    out_dtype
        Of the result: dtype (the default) or float32.
    """
    d, o = canonical_dtype(dtype), canonical_dtype(out_dtype or dtype)
    constants = (("scalar_t", d.ctype), ("out_t", o.ctype), ("ROWS", rows), ("CHUNKS", chunks), ("WARPS", WARPS))
    types = d.short if o is d else f"{d.short}_o{o.short}"
    name = f"tinygemm_{types}_m{rows}_c{chunks}"
    return JitSpec(name, "gemm/tinygemm.cu.jinja", TINYGEMM, constants, block=(32 * WARPS, 1, 1))


def gen_tinygemm2_module() -> JitModule:
    """FlashInfer's name: the kernels of `tinygemm_bf16` for rows of 576 to 2048 elements and more."""
    specs = [
        gen_tinygemm("bfloat16", *tinygemm_shape(rows, depth)) for rows in ROW_CLASSES for depth in (576, 1536, 2048)
    ]
    return JitModule("tinygemm2", tuple(dict.fromkeys(specs)))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    return [
        *gen_tinygemm2_module().specs,
        gen_tinygemm("float16", 1, 1),
        gen_tinygemm("bfloat16", 1, 3, "float32"),
        gen_tinygemm("float16", *tinygemm_shape(MAX_ROWS, 4096), "float32"),
    ]
