"""Gated activations of feed-forward layers: ``act(gate) * up``, gate and up side by side in one tensor."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_same_device, check_same_dtype, check_shape, fail
from pyinfer.core.rows import common_row_layout, vector_length
from pyinfer.core.scales import FP8, check_row_scales, empty_fp8, fp8_dtype, given_scale, is_number
from pyinfer.core.tensor import TensorView, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.jit.spec import JitModule

__all__ = [
    "gelu_and_mul",
    "gelu_and_mul_dynamic_quant",
    "gelu_and_mul_quant",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_dynamic_quant",
    "gelu_tanh_and_mul_quant",
    "silu_and_mul",
    "silu_and_mul_dynamic_quant",
    "silu_and_mul_quant",
]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_calls, _quant_calls, _dynamic_calls = Calls(), Calls(), Calls()


def silu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """SwiGLU's elementwise part: ``silu(input[..., :d]) * input[..., d:]`` with ``silu(x) = x / (1 + exp(-x))``.

    Computed in float32, rounded once. Formula: Shazeer, arXiv 2002.05202.

    Parameters
    ----------
    input
        [..., 2d], float16, bfloat16 or float32, last axis contiguous and a multiple of 16 bytes long; rows may be strided.
    out
        Where to write: [..., d], dtype of input. Allocated if None.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Returns
    -------
    Tensor [..., d] of input's dtype and framework (`out` if given).

    Raises
    ------
    TypeError
        For a dtype not listed, or an `out` of another dtype.
    ValueError
        If the last axis is no multiple of 16 bytes, or shapes or devices do not fit.
    """
    result = _calls.run(("silu", enable_pdl is not False), (input,) if out is None else (input, out))
    return _act_and_mul("silu_and_mul", "silu", input, out, enable_pdl) if result is MISS else result


def gelu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `silu_and_mul` with ``gelu(x) = x (1 + erf(x / sqrt 2)) / 2``."""
    result = _calls.run(("gelu", enable_pdl is not False), (input,) if out is None else (input, out))
    return _act_and_mul("gelu_and_mul", "gelu", input, out, enable_pdl) if result is MISS else result


def gelu_tanh_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `silu_and_mul` with ``gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    result = _calls.run(("gelu_tanh", enable_pdl is not False), (input,) if out is None else (input, out))
    return _act_and_mul("gelu_tanh_and_mul", "gelu_tanh", input, out, enable_pdl) if result is MISS else result


def silu_and_mul_quant(out: Any, input: Any, scale: Any, enable_pdl: bool | None = None) -> None:
    """`silu_and_mul` into 8-bit floats: ``out = silu(input[..., :d]) * input[..., d:] / scale``, computed in float32 and rounded once.

    What lies beyond the largest value of `out`'s dtype, infinities included, becomes that value; NaN stays NaN.

    Parameters
    ----------
    out
        [..., d], float8_e4m3fn or float8_e5m2; rows may be strided.
    input, enable_pdl
        As in `silu_and_mul`.
    scale
        What a stored value is worth: a positive number, or a float32 tensor of one element on input's device (read when the kernel runs).

    Raises
    ------
    TypeError, ValueError
        As `silu_and_mul`; for a scale that is not positive and finite, or on another device.
    """
    _static_quant("silu_and_mul_quant", "silu", out, input, scale, enable_pdl)


def silu_and_mul_dynamic_quant(
    input: Any, out: Any = None, scale: Any = None, quantize_dtype: Any = None, enable_pdl: bool | None = None
) -> tuple[Any, Any]:
    """`silu_and_mul` into 8-bit floats with a scale of its own for each row (each token), found in the same launch.

    A row's scale is its largest magnitude over the largest value of the dtype (448 or 57344), at least 1e-12: ``out * scale`` is the result.

    Parameters
    ----------
    input, enable_pdl
        As in `silu_and_mul`.
    out
        [..., d], float8_e4m3fn or float8_e5m2. Allocated if None.
    scale
        float32 [..., 1], contiguous: the shape of input but for the last axis. Allocated if None.
    quantize_dtype
        float8_e4m3fn or float8_e5m2; None: out's, or float8_e4m3fn.

    Returns
    -------
    (out, scale)

    Raises
    ------
    TypeError, ValueError
        As `silu_and_mul`.
    """
    return _dynamic_quant("silu_and_mul_dynamic_quant", "silu", input, out, scale, quantize_dtype, enable_pdl)


def gelu_and_mul_quant(out: Any, input: Any, scale: Any, enable_pdl: bool | None = None) -> None:
    """As `silu_and_mul_quant` with the activation of `gelu_and_mul`."""
    _static_quant("gelu_and_mul_quant", "gelu", out, input, scale, enable_pdl)


def gelu_and_mul_dynamic_quant(
    input: Any, out: Any = None, scale: Any = None, quantize_dtype: Any = None, enable_pdl: bool | None = None
) -> tuple[Any, Any]:
    """As `silu_and_mul_dynamic_quant` with the activation of `gelu_and_mul`."""
    return _dynamic_quant("gelu_and_mul_dynamic_quant", "gelu", input, out, scale, quantize_dtype, enable_pdl)


def gelu_tanh_and_mul_quant(out: Any, input: Any, scale: Any, enable_pdl: bool | None = None) -> None:
    """As `silu_and_mul_quant` with the activation of `gelu_tanh_and_mul`."""
    _static_quant("gelu_tanh_and_mul_quant", "gelu_tanh", out, input, scale, enable_pdl)


def gelu_tanh_and_mul_dynamic_quant(
    input: Any, out: Any = None, scale: Any = None, quantize_dtype: Any = None, enable_pdl: bool | None = None
) -> tuple[Any, Any]:
    """As `silu_and_mul_dynamic_quant` with the activation of `gelu_tanh_and_mul`."""
    return _dynamic_quant("gelu_tanh_and_mul_dynamic_quant", "gelu_tanh", input, out, scale, quantize_dtype, enable_pdl)


def _input(op: str, input: Any) -> TensorView:
    """View of the input, its dtype and last axis checked."""
    x = view(input, op, "input")
    check_dtype(op, "input", x, _DTYPES)
    size = x.dtype.itemsize
    shape = tuple(x.shape)
    if not shape or shape[-1] * size % 16:
        got = f"{shape[-1] * size} bytes (shape {shape}, {x.dtype.name})" if shape else "a tensor without axes"
        fail(
            op,
            "input",
            "has a last axis of the wrong length",
            got,
            "a multiple of 16 bytes",
            "Pad the hidden dimension.",
        )
    return x


def _act_and_mul(op: str, act: str, input: Any, out: Any, enable_pdl: bool | None) -> Any:
    scalars = (act, enable_pdl is not False)
    tensors = (input,) if out is None else (input, out)
    x = _input(op, input)
    shape, size = tuple(x.shape), x.dtype.itemsize
    width = shape[-1] // 2
    out_shape = (*shape[:-1], width)
    if out is None:
        out = empty(x, out_shape)
        o = view(out)
    else:
        o = view(out, op, "out")
        check_shape(op, "out", o, out_shape)
        check_same_dtype(op, "out", o, "input", x)
        if o.device != x.device:
            check_same_device(op, {"input": x, "out": o})
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    n, inner, x_outer, x_inner = rows
    if not n:
        return out
    if x.device < 0:
        from pyinfer.cpu import activation as cpu

        cpu.act_and_mul(act, x, o, rows, out_rows)
        return out
    _, _, o_outer, o_inner = out_rows
    vec = vector_length(size, x.ptr | o.ptr | (width | x_outer | x_inner | o_outer | o_inner) * size)
    kernel, per_block, chunks, has_pdl = _act_and_mul_kernel(x.device, act, x.dtype.name, width, vec)
    values = (x.ptr, o.ptr, x_outer, x_inner, o_outer, o_inner, n, inner, chunks, width)
    aligned = not (x.ptr | o.ptr) & 15
    outputs = ((out_shape, x.dtype),) if len(tensors) == 1 else ()
    pdl = has_pdl and scalars[1]
    _calls.launch(scalars, tensors, x, kernel, -(-n // per_block) * chunks, values, 2, pdl, aligned, outputs, returns=1)
    return out


@functools.cache
def _act_and_mul_kernel(
    device: int, act: str, dtype: str, width: int, vec: int, out: str | None = None
) -> tuple[Kernel, int, int, bool]:
    """Kernel, rows per block, blocks per row, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.activation import act_config, gen_act_and_mul

    config = act_config(width // vec)
    return (
        gen_act_and_mul(act, dtype, width, vec, out=out).build_and_load(device),
        config.rows,
        config.chunks,
        pdl_supported(device),
    )


def _static_quant(op: str, act: str, out: Any, input: Any, scale: Any, enable_pdl: bool | None) -> None:
    number = is_number(scale)
    scalars = (act, enable_pdl is not False, scale if number else None)
    tensors = (input, out) if number else (input, out, scale)
    if _quant_calls.run(scalars, tensors) is not MISS:
        return
    x = _input(op, input)
    width = x.shape[-1] // 2
    o = view(out, op, "out")
    check_dtype(op, "out", o, FP8)
    check_shape(op, "out", o, (*x.shape[:-1], width))
    if o.device != x.device:
        check_same_device(op, {"input": x, "out": o})
    divisor = given_scale(op, "scale", scale, x)
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    if not rows[0]:
        return
    if x.device < 0:
        from pyinfer.cpu import activation as cpu

        cpu.act_and_mul_quantized(act, x, o, rows, out_rows, float(divisor.numpy()[0]), None)
        return
    vec, strides = _access(x, o, width, rows, out_rows)
    kernel, per_block, chunks, has_pdl = _act_and_mul_kernel(x.device, act, x.dtype.name, width, vec, o.dtype.name)
    n, inner = rows[:2]
    values = (x.ptr, o.ptr, divisor.ptr, *strides, n, inner, chunks, width, divisor.value)
    aligned = not (x.ptr | o.ptr) & 15
    grid = -(-n // per_block) * chunks
    recipe = ((0, 0), (1, 0), None if number else (2, 0))
    pdl = has_pdl and scalars[1]
    _quant_calls.launch(scalars, tensors, x, kernel, grid, values, 3, pdl, aligned, recipe=recipe, wants=2)


def _dynamic_quant(
    op: str, act: str, input: Any, out: Any, scale: Any, quantize_dtype: Any, enable_pdl: bool | None
) -> tuple[Any, Any]:
    given = (out is not None) + 2 * (scale is not None)
    scalars = (act, enable_pdl is not False, given, None if quantize_dtype is None else str(quantize_dtype))
    tensors = (input, *(t for t in (out, scale) if t is not None))
    result = _dynamic_calls.run(scalars, tensors)
    if result is not MISS:
        return result if not given else (out, scale)
    x = _input(op, input)
    width = x.shape[-1] // 2
    shape, scale_shape = (*x.shape[:-1], width), (*x.shape[:-1], 1)
    o = None if out is None else view(out, op, "out")
    dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, o)
    if o is None:
        out = empty_fp8(op, "input", x, shape, dtype)
        o = view(out)
    else:
        check_dtype(op, "out", o, FP8 if quantize_dtype is None else (dtype,))
        check_shape(op, "out", o, shape)
    if scale is None:
        scale = empty(x, scale_shape, FLOAT32)
    s = view(scale, op, "scale")
    check_row_scales(op, s, scale_shape)
    if not x.device == o.device == s.device:
        check_same_device(op, {"input": x, "out": o, "scale": s})
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    if not width and 0 not in shape[:-1]:
        fail(op, "input", "has rows of no elements", tuple(x.shape), "one element or more, to take the scale from")
    if not rows[0]:
        return out, scale
    if x.device < 0:
        from pyinfer.cpu import activation as cpu

        cpu.act_and_mul_quantized(act, x, o, rows, out_rows, 1.0, s)
        return out, scale
    vec, strides = _access(x, o, width, rows, out_rows)
    kernel, per_block, has_pdl = _rows_kernel(x.device, act, x.dtype.name, o.dtype.name, width, vec)
    n, inner = rows[:2]
    values = (x.ptr, o.ptr, s.ptr, *strides, n, inner, width)
    aligned = given in (0, 3) and not (x.ptr | o.ptr) & 15
    outputs = ((shape, dtype), (scale_shape, FLOAT32)) if not given else ()
    grid, pdl = -(-n // per_block), has_pdl and scalars[1]
    _dynamic_calls.launch(scalars, tensors, x, kernel, grid, values, 3, pdl, aligned, outputs, wants=2)
    return out, scale


def _access(
    x: TensorView, o: TensorView, width: int, rows: tuple[int, ...], out_rows: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Elements per access, strides of input and (8-bit) output."""
    size = x.dtype.itemsize
    strides = (*rows[2:], *out_rows[2:])
    bits = width
    for s in strides:
        bits |= s
    return vector_length(size, x.ptr | bits * size | o.ptr * (size // o.dtype.itemsize)), strides


@functools.cache
def _rows_kernel(device: int, act: str, dtype: str, out: str, width: int, vec: int) -> tuple[Kernel, int, bool]:
    """Kernel, rows per block, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.activation import gen_act_and_mul_rows

    spec = gen_act_and_mul_rows(act, dtype, out, width, vec)
    return spec.build_and_load(device), spec.block[1], pdl_supported(device)


def gen_act_and_mul_module(act_func_name: str) -> JitModule:
    """`pyinfer.jit.activation.gen_act_and_mul_module`."""
    from pyinfer.jit.activation import gen_act_and_mul_module as gen

    return gen(act_func_name)


def __getattr__(name: str) -> Any:
    if name == "act_func_def_str":  # lives with the specs; looked up here by users of FlashInfer
        from pyinfer.jit.activation import act_func_def_str

        return act_func_def_str
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


attach(__name__)  # what torch.compile traces in the place of these functions
