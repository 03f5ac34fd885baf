"""RMS normalisation, alone or fused with the residual addition before it, with results of the input's dtype or of 8 bits; layer normalisation."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer._qk_norm_rope import fused_qk_rmsnorm_rope
from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_same_dtype, check_shape, fail
from pyinfer.core.rows import common_row_layout, row_layout, vector_length
from pyinfer.core.tensor import TensorView, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.jit.norm import RowConfig

__all__ = [
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_dynamic_quant",
    "fused_add_rmsnorm_quant",
    "fused_qk_rmsnorm_rope",
    "fused_rmsnorm_silu",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "rmsnorm",
    "rmsnorm_dynamic_quant",
    "rmsnorm_quant",
]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_PLAIN, _GEMMA, _SILU = 0, 1, 2
_norm_calls, _add_calls, _layer_calls = Calls(), Calls(), Calls()


def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """Root-mean-square normalisation over the last axis: ``input / sqrt(mean(input^2) + eps) * weight``.

    The mean and the scaling are computed in float32 and rounded once. Formula: Zhang and Sennrich, arXiv 1910.07467.

    Parameters
    ----------
    input
        [batch, hidden] or [batch, heads, hidden], float16, bfloat16 or float32; any hidden size, any strides but a contiguous last axis.
    weight
        [hidden], dtype of input.
    eps
        Added to the mean of squares.
    out
        Where to write: shape and dtype of input, may be input itself. Allocated if None.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Returns
    -------
    Tensor of input's shape, dtype and framework (`out` if given).

    Raises
    ------
    TypeError
        For a dtype not listed, or dtypes that differ.
    ValueError
        For shapes or devices that do not fit.
    """
    scalars = (eps, _PLAIN, enable_pdl is not False)
    result = _norm_calls.run(scalars, (input, weight) if out is None else (input, weight, out))
    return _rmsnorm("rmsnorm", input, weight, eps, out, enable_pdl, _PLAIN) if result is MISS else result


def gemma_rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `rmsnorm`, multiplied by ``weight + 1`` (Gemma stores its weights less one). The sum is taken in float32."""
    scalars = (eps, _GEMMA, enable_pdl is not False)
    result = _norm_calls.run(scalars, (input, weight) if out is None else (input, weight, out))
    return _rmsnorm("gemma_rmsnorm", input, weight, eps, out, enable_pdl, _GEMMA) if result is MISS else result


def fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """Add and normalise, both in place: ``residual += input``, then ``input = rmsnorm(residual) * weight``.

    The norm is taken of the float32 sum, before the sum is rounded to the residual's dtype.

    Parameters
    ----------
    input, residual
        [batch, hidden] (or [batch, heads, hidden]), float16, bfloat16 or float32, equal shapes and dtypes; overwritten. They must not overlap.
    weight
        [hidden], dtype of input.
    eps
        Added to the mean of squares.
    enable_pdl
        As in `rmsnorm`.

    Raises
    ------
    TypeError, ValueError
        As `rmsnorm`.
    """
    if _add_calls.run((eps, False, enable_pdl is not False), (input, residual, weight)) is MISS:
        _fused_add_rmsnorm("fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, False)


def gemma_fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """As `fused_add_rmsnorm`, multiplied by ``weight + 1``."""
    if _add_calls.run((eps, True, enable_pdl is not False), (input, residual, weight)) is MISS:
        _fused_add_rmsnorm("gemma_fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, True)


def rmsnorm_quant(
    out: Any, input: Any, weight: Any, scale: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`rmsnorm` into 8-bit floats: ``out = rmsnorm(input) * weight / scale``, computed in float32 and rounded once.

    What lies beyond the largest value of `out`'s dtype, infinities included, becomes that value; NaN stays NaN.

    Parameters
    ----------
    out
        Shape of input, float8_e4m3fn or float8_e5m2; any strides but a contiguous last axis.
    input, weight, eps, enable_pdl
        As in `rmsnorm`.
    scale
        What a stored value is worth: a positive number, or a float32 tensor of one element on input's device (read when the kernel runs).

    Raises
    ------
    TypeError, ValueError
        As `rmsnorm`; for a scale that is not positive and finite, or on another device.
    """
    from pyinfer._norm_quant import static_quant

    static_quant("rmsnorm_quant", out, input, None, weight, scale, eps, enable_pdl)


def fused_add_rmsnorm_quant(
    out: Any, input: Any, residual: Any, weight: Any, scale: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`fused_add_rmsnorm` into 8-bit floats: ``residual += input``, then ``out = rmsnorm(residual) * weight / scale``; input stays.

    Parameters and errors as `fused_add_rmsnorm` and `rmsnorm_quant`.
    """
    from pyinfer._norm_quant import static_quant

    static_quant("fused_add_rmsnorm_quant", out, input, residual, weight, scale, eps, enable_pdl)


def rmsnorm_dynamic_quant(
    input: Any,
    weight: Any,
    eps: float = 1e-6,
    out: Any = None,
    scale: Any = None,
    quantize_dtype: Any = None,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """`rmsnorm` into 8-bit floats with a scale of its own for each row (each token), found in the same launch.

    A row's scale is its largest magnitude over the largest value of the dtype (448 or 57344), at least 1e-12: ``out * scale`` is the result.

    Parameters
    ----------
    input, weight, eps, enable_pdl
        As in `rmsnorm`.
    out
        Shape of input, float8_e4m3fn or float8_e5m2. Allocated if None.
    scale
        float32 [..., 1], contiguous: the shape of input but for the last axis, as scaled matrix products take it. Allocated if None.
    quantize_dtype
        float8_e4m3fn or float8_e5m2; None: out's, or float8_e4m3fn.

    Returns
    -------
    (out, scale)

    Raises
    ------
    TypeError, ValueError
        As `rmsnorm`.
    """
    from pyinfer._norm_quant import dynamic_quant

    return dynamic_quant("rmsnorm_dynamic_quant", input, None, weight, eps, out, scale, quantize_dtype, enable_pdl)


def fused_add_rmsnorm_dynamic_quant(
    input: Any,
    residual: Any,
    weight: Any,
    eps: float = 1e-6,
    out: Any = None,
    scale: Any = None,
    quantize_dtype: Any = None,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """`fused_add_rmsnorm` into 8-bit floats with a scale for each row: ``residual += input``, then as `rmsnorm_dynamic_quant`; input stays.

    Parameters, results and errors as `fused_add_rmsnorm` and `rmsnorm_dynamic_quant`.
    """
    from pyinfer._norm_quant import dynamic_quant

    op = "fused_add_rmsnorm_dynamic_quant"
    return dynamic_quant(op, input, residual, weight, eps, out, scale, quantize_dtype, enable_pdl)


def fused_rmsnorm_silu(
    input: Any,
    weight: Any,
    eps: float = 1e-6,
    out: Any = None,
    block_scale: Any = None,
    enable_pdl: bool | None = None,
) -> Any:
    """``silu(rmsnorm(input) * weight)`` with ``silu(x) = x / (1 + exp(-x))``.

    Parameters
    ----------
    input, weight, eps, enable_pdl
        As in `rmsnorm`.
    out
        Shape of input, and its dtype or float8_e4m3fn (saturating, without a scale). Allocated with input's dtype if None.
    block_scale
        Must be None: FlashInfer's block-scaled 4-bit output is not made here.

    Returns
    -------
    Tensor of input's shape (`out` if given).

    Raises
    ------
    TypeError, ValueError
        As `rmsnorm`; for a block_scale.
    """
    op = "fused_rmsnorm_silu"
    if block_scale is not None:
        fix = "4-bit block-scaled results are not supported: give an out of the input's dtype or float8_e4m3fn."
        fail(op, "block_scale", "is given", type(block_scale).__name__, None, fix)
    if out is not None and view(out, op, "out").dtype is FLOAT8_E4M3:
        from pyinfer._norm_quant import static_quant

        static_quant(op, out, input, None, weight, 1.0, eps, enable_pdl, True)
        return out
    scalars = (eps, _SILU, enable_pdl is not False)
    result = _norm_calls.run(scalars, (input, weight) if out is None else (input, weight, out))
    return _rmsnorm(op, input, weight, eps, out, enable_pdl, _SILU) if result is MISS else result


def layernorm(
    input: Any, gemma: Any, beta: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None
) -> Any:
    """Layer normalisation over the last axis: ``(input - mean) / sqrt(variance + eps) * gemma + beta``.

    Mean, variance (of the deviations from the mean, over all elements) and result are computed in float32; the result is rounded once. Formula: Ba, Kiros and
    Hinton, arXiv 1607.06450.

    Parameters
    ----------
    input
        [batch, hidden] or [batch, heads, hidden], float16, bfloat16 or float32; any hidden size, any strides but a contiguous last axis.
    gemma, beta
        [hidden], float32 or dtype of input, both the same: factor and offset (the names are FlashInfer's).
    eps
        Added to the variance.
    out
        Where to write: shape and dtype of input, may be input itself. Allocated if None.
    enable_pdl
        As in `rmsnorm`.

    Returns
    -------
    Tensor of input's shape, dtype and framework (`out` if given).

    Raises
    ------
    TypeError, ValueError
        As `rmsnorm`.
    """
    op = "layernorm"
    scalars = (eps, enable_pdl is not False)
    tensors = (input, gemma, beta) if out is None else (input, gemma, beta, out)
    result = _layer_calls.run(scalars, tensors)
    if result is not MISS:
        return result
    x, w, b = view(input, op, "input"), view(gemma, op, "gemma"), view(beta, op, "beta")
    check_ndim(op, "input", x, (2, 3))
    check_dtype(op, "input", x, _DTYPES)
    hidden = x.shape[-1]
    for arg, v in (("gemma", w), ("beta", b)):
        check_shape(op, arg, v, (hidden,))
        check_dtype(op, arg, v, (FLOAT32, x.dtype))
        row_layout(op, arg, v)
    check_same_dtype(op, "beta", b, "gemma", w)
    check_same_device(op, {"input": x, "gemma": w, "beta": b})
    if out is None:
        out = empty(x, x.shape)
        o = view(out)
    else:
        o = view(out, op, "out")
        check_shape(op, "out", o, tuple(x.shape))
        check_same_dtype(op, "out", o, "input", x)
        check_same_device(op, {"input": x, "out": o})
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    n, inner, x_outer, x_inner = rows
    if not n or not hidden:
        return out
    device = x.device
    if device < 0:
        from pyinfer.cpu import norm as cpu

        cpu.layernorm(x, w, b, o, rows, out_rows, eps)
        return out
    _, _, o_outer, o_inner = out_rows
    size, param_size = x.dtype.itemsize, w.dtype.itemsize
    bits = (x.ptr | o.ptr) | (hidden | x_outer | x_inner | o_outer | o_inner) * size
    vec = vector_length(size, bits)
    if (w.ptr | b.ptr) & (min(16, vec * param_size) - 1):
        vec = 1
    kernel, config, has_pdl = _layernorm_kernel(device, x.dtype.name, w.dtype.name, hidden, vec)
    values = (x.ptr, w.ptr, b.ptr, o.ptr, x_outer, x_inner, o_outer, o_inner, n, inner, hidden, 1.0 / hidden, eps)
    aligned = not (x.ptr | w.ptr | b.ptr | o.ptr) & 15
    outputs = ((x.shape, x.dtype),) if len(tensors) == 3 else ()
    pdl = has_pdl and scalars[1]
    _layer_calls.launch(scalars, tensors, x, kernel, config.grid(n), values, 4, pdl, aligned, outputs, returns=3)
    return out


def check_inputs(op: str, x: TensorView, weight: TensorView, other_arg: str, other: TensorView | None) -> None:
    """What the RMS normalisations demand of input, weight and a second tensor like the input."""
    check_ndim(op, "input", x, (2, 3))
    check_dtype(op, "input", x, _DTYPES)
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_same_dtype(op, "weight", weight, "input", x)
    if weight.device != x.device:
        check_same_device(op, {"input": x, "weight": weight})
    if weight.strides[0] != 1:
        row_layout(op, "weight", weight)  # raises unless there is just one element
    if other is not None:
        check_shape(op, other_arg, other, tuple(x.shape))
        check_same_dtype(op, other_arg, other, "input", x)
        if other.device != x.device:
            check_same_device(op, {"input": x, other_arg: other})


def _rmsnorm(
    op: str,
    input: Any,
    weight: Any,
    eps: float,
    out: Any,
    enable_pdl: bool | None,
    form: int,
) -> Any:
    scalars = (eps, form, enable_pdl is not False)
    tensors = (input, weight) if out is None else (input, weight, out)
    x, w = view(input, op, "input"), view(weight, op, "weight")
    if out is None:
        check_inputs(op, x, w, "", None)
        out = empty(x, x.shape)
        o = view(out)
    else:
        o = view(out, op, "out")
        check_inputs(op, x, w, "out", o)
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    n, inner, x_outer, x_inner = rows
    hidden = x.shape[-1]
    if not n or not hidden:
        return out
    device = x.device
    if device < 0:
        from pyinfer.cpu import norm as cpu

        cpu.rmsnorm(x, w, o, rows, out_rows, eps, 1.0 if form == _GEMMA else 0.0, form == _SILU)
        return out
    _, _, o_outer, o_inner = out_rows
    size = x.dtype.itemsize
    vec = vector_length(size, x.ptr | w.ptr | o.ptr | (hidden | x_outer | x_inner | o_outer | o_inner) * size)
    kernel, config, has_pdl = _rmsnorm_kernel(device, x.dtype.name, hidden, vec, form)
    values = (x.ptr, w.ptr, o.ptr, x_outer, x_inner, o_outer, o_inner, n, inner, hidden, 1.0 / hidden, eps)
    aligned = not (x.ptr | w.ptr | o.ptr) & 15
    outputs = ((x.shape, x.dtype),) if len(tensors) == 2 else ()
    pdl = has_pdl and scalars[2]
    _norm_calls.launch(scalars, tensors, x, kernel, config.grid(n), values, 3, pdl, aligned, outputs, returns=2)
    return out


def _fused_add_rmsnorm(
    op: str, input: Any, residual: Any, weight: Any, eps: float, enable_pdl: bool | None, gemma: bool
) -> None:
    scalars = (eps, gemma, enable_pdl is not False)
    x, r, w = view(input, op, "input"), view(residual, op, "residual"), view(weight, op, "weight")
    check_inputs(op, x, w, "residual", r)
    rows, residual_rows = common_row_layout(op, "input", x, "residual", r)
    n, inner, x_outer, x_inner = rows
    hidden = x.shape[-1]
    if not n or not hidden:
        return
    device = x.device
    if device < 0:
        from pyinfer.cpu import norm as cpu

        cpu.fused_add_rmsnorm(x, r, w, rows, residual_rows, eps, 1.0 if gemma else 0.0)
        return
    _, _, r_outer, r_inner = residual_rows
    size = x.dtype.itemsize
    vec = vector_length(size, x.ptr | w.ptr | r.ptr | (hidden | x_outer | x_inner | r_outer | r_inner) * size)
    kernel, per_block, has_pdl = _fused_add_rmsnorm_kernel(device, x.dtype.name, hidden, vec, gemma)
    values = (x.ptr, r.ptr, w.ptr, x_outer, x_inner, r_outer, r_inner, n, inner, hidden, 1.0 / hidden, eps)
    aligned = not (x.ptr | r.ptr | w.ptr) & 15
    pdl = has_pdl and scalars[2]
    _add_calls.launch(scalars, (input, residual, weight), x, kernel, -(-n // per_block), values, 3, pdl, aligned)


@functools.cache
def _rmsnorm_kernel(device: int, dtype: str, hidden: int, vec: int, form: int) -> tuple[Kernel, RowConfig, bool]:
    """Kernel, its configuration, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_rmsnorm, rmsnorm_config

    spec = gen_rmsnorm(dtype, hidden, vec, form == _GEMMA, silu=form == _SILU)
    return spec.build_and_load(device), rmsnorm_config(hidden // vec), pdl_supported(device)


@functools.cache
def _layernorm_kernel(
    device: int, dtype: str, param_dtype: str, hidden: int, vec: int
) -> tuple[Kernel, RowConfig, bool]:
    """Kernel, its configuration, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_layernorm, layernorm_config

    spec = gen_layernorm(dtype, param_dtype, hidden, vec)
    return spec.build_and_load(device), layernorm_config(hidden // vec), pdl_supported(device)


@functools.cache
def _fused_add_rmsnorm_kernel(device: int, dtype: str, hidden: int, vec: int, gemma: bool) -> tuple[Kernel, int, bool]:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_fused_add_rmsnorm

    spec = gen_fused_add_rmsnorm(dtype, hidden, vec, gemma)
    return spec.build_and_load(device), spec.block[1], pdl_supported(device)


attach(__name__)  # what torch.compile traces in the place of these functions
