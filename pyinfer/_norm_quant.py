"""RMS normalisation with 8-bit results, alone or fused with the residual addition: what `pyinfer.norm`'s functions of these names do."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import FLOAT32
from pyinfer.core.errors import check_dtype, check_same_device, check_shape, fail
from pyinfer.core.rows import row_layout, vector_length
from pyinfer.core.scales import FP8, Scale, check_row_scales, empty_fp8, fp8_dtype, given_scale, is_number
from pyinfer.core.tensor import TensorView, empty, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.jit.norm import RowConfig

_static_calls, _dynamic_calls = Calls(), Calls()
_NUMBER = Scale(None, 1.0, 1)


def static_quant(
    op: str,
    out: Any,
    input: Any,
    residual: Any,
    weight: Any,
    scale: Any,
    eps: float,
    enable_pdl: bool | None,
    silu: bool = False,
) -> None:
    """Results (passed through silu, if asked for) divided by one scale. `residual` None: no addition."""
    number = is_number(scale)
    scalars = (residual is None, eps, enable_pdl is not False, scale if number else None, silu)
    tensors = (input, weight, out) if residual is None else (input, residual, weight, out)
    known = tensors if number else (*tensors, scale)
    if _static_calls.run(scalars, known) is not MISS:
        return
    x, w, r = _inputs(op, input, weight, residual)
    o = view(out, op, "out")
    check_dtype(op, "out", o, FP8)
    _check_out(op, x, o)
    divisor = given_scale(op, "scale", scale, x)
    _launch(op, x, r, w, o, divisor, None, eps, enable_pdl, _static_calls, scalars, known, (), silu=silu)


def dynamic_quant(
    op: str,
    input: Any,
    residual: Any,
    weight: Any,
    eps: float,
    out: Any,
    scale: Any,
    quantize_dtype: Any,
    enable_pdl: bool | None,
) -> tuple[Any, Any]:
    """Results divided by each row's own scale."""
    given = (out is not None) + 2 * (scale is not None)
    scalars = (residual is None, eps, enable_pdl is not False, given, None if quantize_dtype is None else str(quantize_dtype))  # fmt: skip
    inputs = (input, weight) if residual is None else (input, residual, weight)
    known = (*inputs, *(t for t in (out, scale) if t is not None))
    result = _dynamic_calls.run(scalars, known)
    if result is not MISS:
        return result if not given else (out, scale)
    x, w, r = _inputs(op, input, weight, residual)
    o = None if out is None else view(out, op, "out")
    dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, o)
    if o is None:
        out = empty_fp8(op, "input", x, tuple(x.shape), dtype)
        o = view(out)
    else:
        check_dtype(op, "out", o, FP8 if quantize_dtype is None else (dtype,))
        _check_out(op, x, o)
    shape = (*x.shape[:-1], 1)
    if scale is None:
        scale = empty(x, shape, FLOAT32)
    s = view(scale, op, "scale")
    check_row_scales(op, s, shape)
    if s.device != x.device:
        check_same_device(op, {"input": x, "scale": s})
    if not x.shape[-1] and 0 not in x.shape[:-1]:
        fail(op, "input", "has rows of no elements", tuple(x.shape), "one element or more, to take the scale from")
    outputs = ((x.shape, dtype), (shape, FLOAT32)) if not given else ()
    whole = given in (0, 3)  # one given, one not: nothing `find` could be asked with
    _launch(op, x, r, w, o, _NUMBER, s, eps, enable_pdl, _dynamic_calls, scalars, known, outputs, whole)
    return out, scale


def _inputs(op: str, input: Any, weight: Any, residual: Any) -> tuple[TensorView, TensorView, TensorView | None]:
    from pyinfer.norm import check_inputs

    x, w = view(input, op, "input"), view(weight, op, "weight")
    r = None if residual is None else view(residual, op, "residual")
    check_inputs(op, x, w, "residual", r)
    return x, w, r


def _check_out(op: str, x: TensorView, o: TensorView) -> None:
    check_shape(op, "out", o, tuple(x.shape))
    if o.device != x.device:
        check_same_device(op, {"input": x, "out": o})


def _launch(
    op: str,
    x: TensorView,
    r: TensorView | None,
    w: TensorView,
    o: TensorView,
    scale: Scale,
    scales: TensorView | None,
    eps: float,
    enable_pdl: bool | None,
    calls: Calls,
    scalars: tuple[Any, ...],
    known: tuple[Any, ...],
    outputs: tuple[Any, ...],
    remember: bool = True,
    silu: bool = False,
) -> None:
    """`scales`: where each row's own scale goes; None: divide by `scale`."""
    operands = [("input", x), ("out", o)] if r is None else [("input", x), ("residual", r), ("out", o)]
    layouts = common_layouts(op, operands)
    n, inner = layouts[0][:2]
    hidden = x.shape[-1]
    if not n or not hidden:
        return
    device = x.device
    if device < 0:
        from pyinfer.cpu import norm as cpu

        cpu.quantized(x, r, w, o, layouts, eps, float(scale.numpy()[0]), scales, silu)
        return
    sizes = [v.dtype.itemsize for _, v in operands]
    bits = w.ptr | hidden * x.dtype.itemsize
    for (_, v), layout, size in zip(operands, layouts, sizes, strict=True):
        # An access of the 8-bit result is as many elements as one of the input, so half or a quarter of its bytes.
        bits |= (v.ptr | (layout[2] | layout[3]) * size) * (x.dtype.itemsize // size)
    vec = vector_length(x.dtype.itemsize, bits)
    quantize = "row" if scales is not None else "tensor"
    kernel, config, has_pdl = _kernel(device, r is not None, x.dtype.name, hidden, vec, quantize, o.dtype.name, silu)
    pointers = (x.ptr, w.ptr, o.ptr) if r is None else (x.ptr, r.ptr, w.ptr, o.ptr)
    strides = [s for layout in layouts for s in layout[2:]]
    last = (scale.value,) if scales is None else ()
    scale_ptr = scale.ptr if scales is None else scales.ptr
    values = (*pointers, scale_ptr, *strides, n, inner, hidden, 1.0 / hidden, eps, *last)
    address = 0
    for pointer in pointers:
        address |= pointer
    aligned = remember and not address & 15
    count = len(pointers)
    recipe = (*((i, 0) for i in range(count)), (count, 0) if scale_ptr else None)
    pdl = has_pdl and enable_pdl is not False
    grid = config.grid(n)
    calls.launch(scalars, known, x, kernel, grid, values, count + 1, pdl, aligned, outputs, recipe, count)


def common_layouts(op: str, operands: list[tuple[str, TensorView]]) -> list[tuple[int, int, int, int]]:
    """`row_layout` of several tensors of one leading shape, under one grouping."""
    layouts = [row_layout(op, arg, v) for arg, v in operands]
    inner = next((layout[1] for layout in layouts if layout[1] != layout[0]), layouts[0][1])
    return [
        layout if layout[1] == inner else row_layout(op, arg, v, inner)
        for layout, (arg, v) in zip(layouts, operands, strict=True)
    ]


@functools.cache
def _kernel(
    device: int, add: bool, dtype: str, hidden: int, vec: int, quantize: str, out: str, silu: bool
) -> tuple[Kernel, RowConfig, bool]:
    """Kernel, its configuration, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit import norm

    if add:
        config = norm.fused_add_config(hidden // vec)
        spec = norm.gen_fused_add_rmsnorm(dtype, hidden, vec, False, quantize, out)
    else:
        config = norm.rmsnorm_config(hidden // vec)
        spec = norm.gen_rmsnorm(dtype, hidden, vec, False, quantize, out, silu)
    return spec.build_and_load(device), config, pdl_supported(device)
