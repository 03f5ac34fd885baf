"""Gated activations in Triton."""

from __future__ import annotations

from typing import Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, canonical_dtype
from pyinfer.core.errors import check_dtype, check_same_device, check_shape, fail
from pyinfer.triton._launch import kernels, next_power_of_2, on_device, one_scale, torch_view
from pyinfer.triton.norm import LARGEST, layouts, no_pdl

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT8_E4M3, FLOAT8_E5M2)
_FP8 = (FLOAT8_E4M3, FLOAT8_E5M2)
_ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def silu_and_mul(x: Any, x_scale: Any = None, o_scale: Any = None, dtype: Any = None, *, out: Any = None) -> Any:
    """``silu(g) * u * o_scale`` of ``g, u = x[..., :d] * x_scale, x[..., d:] * x_scale``, clamped to the result's range if there is an o_scale.

    Parameters
    ----------
    x
        [..., 2d], float16, bfloat16, float32, float8_e4m3fn or float8_e5m2; any d, last axis contiguous, leading axes that collapse into two strides.
    x_scale, o_scale
        Numbers, float32 tensors of one element, or None (1).
    dtype
        Of the result, any of x's dtypes; x's by default.
    out
        Where to write: [..., d]; its dtype counts, then.

    Returns
    -------
    torch.Tensor
        [..., d].

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    ImportError
        Without triton.
    """
    return _act_and_mul("triton.activation.silu_and_mul", "silu", x, x_scale, o_scale, dtype, out)


def gelu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """`pyinfer.gelu_and_mul` in Triton, for any d. `enable_pdl` must be None or False."""
    no_pdl("triton.activation.gelu_and_mul", enable_pdl)
    return _act_and_mul("triton.activation.gelu_and_mul", "gelu", input, None, None, None, out)


def gelu_tanh_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """`pyinfer.gelu_tanh_and_mul` in Triton, for any d. `enable_pdl` must be None or False."""
    no_pdl("triton.activation.gelu_tanh_and_mul", enable_pdl)
    return _act_and_mul("triton.activation.gelu_tanh_and_mul", "gelu_tanh", input, None, None, None, out)


def _act_and_mul(op: str, act: str, input: Any, x_scale: Any, o_scale: Any, dtype: Any, out: Any) -> Any:
    module = kernels(op)
    x = torch_view(op, "x", input)
    check_dtype(op, "x", x, _DTYPES)
    shape = tuple(x.shape)
    if not shape or shape[-1] % 2:
        fail(op, "x", "has no last axis of two halves", f"shape {shape}", "[..., 2d]")
    width = shape[-1] // 2
    if out is None:
        import torch

        wanted = x.dtype if dtype is None else canonical_dtype(dtype, op, "dtype")
        out = x.obj.new_empty((*shape[:-1], width), dtype=getattr(torch, wanted.name))
    o = torch_view(op, "out", out)
    check_dtype(op, "out", o, _DTYPES)
    check_shape(op, "out", o, (*shape[:-1], width))
    check_same_device(op, {"x": x, "out": o})
    (n, inner, *x_at), (_, _, *o_at) = layouts(op, {"x": x, "out": o})
    if not n or not width:
        return out
    first, last = one_scale(op, "x_scale", x_scale, x), one_scale(op, "o_scale", o_scale, x)
    block = min(next_power_of_2(width), 1024)
    with on_device(x):
        module.act_and_mul[(n, -(-width // block))](
            x.obj, o.obj, x.obj if first is None else first, x.obj if last is None else last, *x_at, *o_at, inner, width, ACT=_ACTS[act],
            HAS_X_SCALE=first is not None, HAS_OUT_SCALE=last is not None,
            LARGEST=LARGEST.get(o.dtype.name, 0.0) if last is not None or o.dtype in _FP8 else 0.0, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
