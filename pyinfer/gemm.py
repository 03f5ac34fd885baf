"""Matrix products."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_same_dtype, check_shape, fail
from pyinfer.core.tensor import view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = ["tinygemm_bf16"]

_calls = Calls()


def tinygemm_bf16(input: Any, weight: Any, out: Any, bias: Any = None, use_pdl: bool = False) -> None:
    """``out = input @ weight.T + bias`` for a few rows: a linear layer of a small decode batch, made for latency.

    Accumulated in float32, rounded once. It reads every weight once for up to 8 rows; beyond that, once more for every 8, and a product through the tensor
    cores (torch's) is the better choice.

    Parameters
    ----------
    input
        [rows, depth], bfloat16 or float16; the last axis contiguous, rows a multiple of 16 bytes apart, depth a multiple of 8.
    weight
        [columns, depth], of input's dtype; laid out likewise.
    out
        [rows, columns], of input's dtype or float32; the last axis contiguous.
    bias
        [columns] of input's dtype, contiguous; None: 0.
    use_pdl
        Programmatic dependent launch, where the GPU has it. NOTE: weight and bias are then read while the kernel before may still run; it must not write them.

    Raises
    ------
    TypeError, ValueError
        For other dtypes, shapes, strides or devices, before any launch.
    """
    op = "tinygemm_bf16"
    use_pdl = bool(use_pdl)
    tensors = (input, weight, out) if bias is None else (input, weight, out, bias)
    if _calls.run(use_pdl, tensors) is not MISS:
        return
    x, w, o = view(input, op, "input"), view(weight, op, "weight"), view(out, op, "out")
    for arg, v in (("input", x), ("weight", w), ("out", o)):
        check_ndim(op, arg, v, 2)
    check_dtype(op, "input", x, (BFLOAT16, FLOAT16))
    check_same_dtype(op, "weight", w, "input", x)
    check_dtype(op, "out", o, (x.dtype, FLOAT32))
    (rows, depth), columns = x.shape, w.shape[0]
    check_shape(op, "weight", w, (None, depth))
    check_shape(op, "out", o, (rows, columns))
    b = None
    views = {"input": x, "weight": w, "out": o}
    if bias is not None:
        b = views["bias"] = view(bias, op, "bias")
        check_same_dtype(op, "bias", b, "input", x)
        check_shape(op, "bias", b, (columns,))
    check_same_device(op, views)
    if not rows or not columns:
        return
    for arg, v in views.items():
        if v.shape[-1] > 1 and v.strides[-1] != 1:
            fail(op, arg, "is not contiguous along its last axis", f"strides {tuple(v.strides)}", "a last stride of 1")
    if depth % 8:
        fail(op, "input", "has a last axis of the wrong length", depth, "a multiple of 8")
    for arg, v in (("input", x), ("weight", w)):
        if v.ptr % 16 or (v.shape[0] > 1 and v.strides[0] % 8):
            got = f"address {v.ptr % 16} modulo 16, rows {v.strides[0] * v.dtype.itemsize} bytes apart"
            fail(op, arg, "is not aligned", got, "multiples of 16 bytes", f"Pass {arg}.contiguous().")
    if x.device < 0:
        from pyinfer.cpu.gemm import tinygemm

        tinygemm(x, w, o, b)
        return
    kernel, warps, tile, has_pdl = _kernel(x.device, x.dtype.name, rows, depth, o.dtype.name)
    grid = (-(-columns // warps), -(-rows // tile), 1)
    strides = (x.strides[0], w.strides[0], o.strides[0])
    values = (x.ptr, w.ptr, o.ptr, 0 if b is None else b.ptr, *strides, rows, columns, depth)
    aligned = not (x.ptr | w.ptr | o.ptr | (0 if b is None else b.ptr)) & 15
    recipe = None if b is not None else ((0, 0), (1, 0), (2, 0), None)
    _calls.launch(use_pdl, tensors, x, kernel, grid, values, 4, use_pdl and has_pdl, aligned, recipe=recipe)


@functools.cache
def _kernel(device: int, dtype: str, rows: int, depth: int, out_dtype: str) -> tuple[Kernel, int, int, bool]:
    """Kernel, columns a block, rows a block, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.gemm import WARPS, gen_tinygemm, tinygemm_shape

    tile, chunks = tinygemm_shape(rows, depth)
    return gen_tinygemm(dtype, tile, chunks, out_dtype).build_and_load(device), WARPS, tile, pdl_supported(device)


attach(__name__)  # what torch.compile traces in the place of these functions
