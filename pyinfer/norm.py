"""RMS normalisation, alone or fused with the residual addition before it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_same_dtype, check_shape
from pyinfer.core.rows import common_row_layout, row_layout, vector_length
from pyinfer.core.tensor import TensorView, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = ["fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "gemma_rmsnorm", "rmsnorm"]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_norm_calls, _add_calls = Calls(), Calls()


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
    return _rmsnorm("rmsnorm", input, weight, eps, out, enable_pdl, False)


def gemma_rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `rmsnorm`, multiplied by ``weight + 1`` (Gemma stores its weights less one). The sum is taken in float32."""
    return _rmsnorm("gemma_rmsnorm", input, weight, eps, out, enable_pdl, True)


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
    _fused_add_rmsnorm("fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, False)


def gemma_fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """As `fused_add_rmsnorm`, multiplied by ``weight + 1``."""
    _fused_add_rmsnorm("gemma_fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, True)


def _check(op: str, x: TensorView, weight: TensorView, other_arg: str, other: TensorView | None) -> None:
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


def _rmsnorm(op: str, input: Any, weight: Any, eps: float, out: Any, enable_pdl: bool | None, gemma: bool) -> Any:
    scalars = (eps, gemma, enable_pdl is not False)
    tensors = (input, weight) if out is None else (input, weight, out)
    call = _norm_calls.find(scalars, tensors)
    if call is not None:
        ptr = call.ptr
        result = call.new() if out is None else out
        x_ptr, w_ptr, out_ptr = ptr(input), ptr(weight), ptr(result)
        if not (x_ptr | w_ptr | out_ptr) & 15:
            call.launch(call.stream(call.device), x_ptr, w_ptr, out_ptr)
            return result
    x, w = view(input, op, "input"), view(weight, op, "weight")
    if out is None:
        _check(op, x, w, "", None)
        out = empty(x, x.shape)
        o = view(out)
    else:
        o = view(out, op, "out")
        _check(op, x, w, "out", o)
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    n, inner, x_outer, x_inner = rows
    hidden = x.shape[-1]
    if not n or not hidden:
        return out
    device = x.device
    if device < 0:
        from pyinfer.cpu import norm as cpu

        cpu.rmsnorm(x, w, o, rows, out_rows, eps, 1.0 if gemma else 0.0)
        return out
    _, _, o_outer, o_inner = out_rows
    size = x.dtype.itemsize
    vec = vector_length(size, x.ptr | w.ptr | o.ptr | (hidden | x_outer | x_inner | o_outer | o_inner) * size)
    kernel, per_block, has_pdl = _rmsnorm_kernel(device, x.dtype.name, hidden, vec, gemma)
    values = (x.ptr, w.ptr, o.ptr, x_outer, x_inner, o_outer, o_inner, n, inner, hidden, 1.0 / hidden, eps)
    aligned = not (x.ptr | w.ptr | o.ptr) & 15
    outputs = ((x.shape, x.dtype),) if len(tensors) == 2 else ()
    pdl = has_pdl and scalars[2]
    _norm_calls.launch(scalars, tensors, x, kernel, -(-n // per_block), values, 3, pdl, aligned, outputs)
    return out


def _fused_add_rmsnorm(
    op: str, input: Any, residual: Any, weight: Any, eps: float, enable_pdl: bool | None, gemma: bool
) -> None:
    scalars = (eps, gemma, enable_pdl is not False)
    call = _add_calls.find(scalars, (input, residual, weight))
    if call is not None:
        ptr = call.ptr
        x_ptr, r_ptr, w_ptr = ptr(input), ptr(residual), ptr(weight)
        if not (x_ptr | r_ptr | w_ptr) & 15:
            call.launch(call.stream(call.device), x_ptr, r_ptr, w_ptr)
            return
    x, r, w = view(input, op, "input"), view(residual, op, "residual"), view(weight, op, "weight")
    _check(op, x, w, "residual", r)
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
def _rmsnorm_kernel(device: int, dtype: str, hidden: int, vec: int, gemma: bool) -> tuple[Kernel, int, bool]:
    """Kernel, rows per block, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_rmsnorm

    spec = gen_rmsnorm(dtype, hidden, vec, gemma)
    return spec.build_and_load(device), spec.block[1], pdl_supported(device)


@functools.cache
def _fused_add_rmsnorm_kernel(device: int, dtype: str, hidden: int, vec: int, gemma: bool) -> tuple[Kernel, int, bool]:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_fused_add_rmsnorm

    spec = gen_fused_add_rmsnorm(dtype, hidden, vec, gemma)
    return spec.build_and_load(device), spec.block[1], pdl_supported(device)


attach(__name__)  # what torch.compile traces in the place of these functions
