"""RMS normalisation in Triton."""

from __future__ import annotations

from typing import Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_shape, fail
from pyinfer.core.rows import row_layout
from pyinfer.core.tensor import TensorView
from pyinfer.triton._launch import kernels, next_power_of_2, on_device, one_scale, torch_view, warps

__all__ = [
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "rms_norm",
    "rms_norm_add_residual",
    "rmsnorm",
]

_FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
_FP8 = (FLOAT8_E4M3, FLOAT8_E5M2)
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
"""Largest finite values of the dtypes that results are clamped to."""
_LARGEST_BLOCK = 16384


def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """`pyinfer.rmsnorm` in Triton: torch tensors on a GPU. `enable_pdl` must be None or False: Triton's launches wait for the kernel before them."""
    return _norm("triton.norm.rmsnorm", input, weight, eps, out, enable_pdl, 0.0)


def gemma_rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """`pyinfer.gemma_rmsnorm` in Triton."""
    return _norm("triton.norm.gemma_rmsnorm", input, weight, eps, out, enable_pdl, 1.0)


def fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`pyinfer.fused_add_rmsnorm` in Triton."""
    op = "triton.norm.fused_add_rmsnorm"
    no_pdl(op, enable_pdl)
    _launch(op, input, residual, weight, input, eps, None, None, 0.0)


def gemma_fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`pyinfer.gemma_fused_add_rmsnorm` in Triton."""
    op = "triton.norm.gemma_fused_add_rmsnorm"
    no_pdl(op, enable_pdl)
    _launch(op, input, residual, weight, input, eps, None, None, 1.0)


def rms_norm(x: Any, weight: Any, out: Any, eps: float, in_scale: Any = None, out_scale: Any = None) -> None:
    """``out = rmsnorm(x * in_scale) * weight * out_scale``, clamped to out's range if there is an out_scale.

    Parameters
    ----------
    x
        [rows, hidden] or [rows, heads, hidden], float16, bfloat16, float32, float8_e4m3fn or float8_e5m2; any strides but a contiguous last axis.
    weight
        [hidden], any of the floating dtypes.
    out
        Shape of x, any of its dtypes; may be x.
    eps
        Added to the mean of squares.
    in_scale, out_scale
        Numbers, float32 tensors of one element, or None (1).

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    ImportError
        Without triton.
    """
    _launch("triton.norm.rms_norm", x, None, weight, out, eps, in_scale, out_scale, 0.0)


def rms_norm_add_residual(
    x: Any,
    residual: Any,
    weight: Any,
    eps: float,
    x_out: Any = None,
    x_in_scale: Any = None,
    x_out_scale: Any = None,
) -> None:
    """``residual += x * x_in_scale``, then ``x_out = rmsnorm(residual) * weight * x_out_scale``, clamped as in `rms_norm`.

    The norm is taken of the float32 sum. Parameters as in `rms_norm`; `residual` has x's shape and is overwritten, `x_out` is x if None.
    """
    out = x if x_out is None else x_out
    _launch("triton.norm.rms_norm_add_residual", x, residual, weight, out, eps, x_in_scale, x_out_scale, 0.0)


def no_pdl(op: str, enable_pdl: bool | None) -> None:
    """ValueError for enable_pdl=True."""
    if enable_pdl:
        fail(op, "enable_pdl", "is not available", enable_pdl, "None or False", "The CUDA operators have it.")


def _norm(op: str, input: Any, weight: Any, eps: float, out: Any, enable_pdl: bool | None, bias: float) -> Any:
    no_pdl(op, enable_pdl)
    kernels(op)
    if out is None:
        x = torch_view(op, "input", input)
        out = x.obj.new_empty(tuple(x.shape))
    _launch(op, input, None, weight, out, eps, None, None, bias)
    return out


def _launch(
    op: str,
    input: Any,
    residual: Any,
    weight: Any,
    out: Any,
    eps: float,
    in_scale: Any,
    out_scale: Any,
    bias: float,
) -> None:
    module = kernels(op)
    x, w, o = torch_view(op, "input", input), torch_view(op, "weight", weight), torch_view(op, "out", out)
    r = x if residual is None else torch_view(op, "residual", residual)
    check_ndim(op, "input", x, (2, 3))
    for arg, v, dtypes in (("input", x, (*_FLOATS, *_FP8)), ("weight", w, _FLOATS), ("out", o, (*_FLOATS, *_FP8))):
        check_dtype(op, arg, v, dtypes)
    check_dtype(op, "residual", r, _FLOATS if residual is not None else (x.dtype,))
    check_shape(op, "weight", w, (x.shape[-1],))
    check_shape(op, "out", o, tuple(x.shape))
    check_shape(op, "residual", r, tuple(x.shape))
    check_same_device(op, {"input": x, "weight": w, "out": o, "residual": r})
    row_layout(op, "weight", w)
    (n, inner, *x_at), (_, _, *r_at), (_, _, *o_at) = layouts(op, {"input": x, "residual": r, "out": o})
    hidden = x.shape[-1]
    if not n or not hidden:
        return
    first, last = one_scale(op, "in_scale", in_scale, x), one_scale(op, "out_scale", out_scale, x)
    block = min(next_power_of_2(hidden), _LARGEST_BLOCK)
    with on_device(x):
        module.rmsnorm[(n,)](
            x.obj, r.obj, w.obj, o.obj, w.obj if first is None else first, w.obj if last is None else last, *x_at, *r_at, *o_at, inner, hidden,
            eps, ADD=residual is not None, BIAS=bias, HAS_X_SCALE=first is not None, HAS_OUT_SCALE=last is not None,
            LARGEST=LARGEST.get(o.dtype.name, 0.0) if last is not None or o.dtype in _FP8 else 0.0,
            ONE_BLOCK=hidden <= block, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip


def layouts(op: str, views: dict[str, TensorView]) -> list[tuple[int, int, int, int]]:
    """`row_layout` of tensors of equal leading shape, under one grouping of their rows."""
    made = {arg: row_layout(op, arg, v) for arg, v in views.items()}
    grouped = [layout[1] for layout in made.values() if layout[1] != layout[0]]
    if grouped:  # those that are one run of rows split anywhere
        made = {arg: row_layout(op, arg, v, grouped[0]) for arg, v in views.items()}
    return list(made.values())
