"""Quantising and packing in Triton."""

from __future__ import annotations

from typing import Any

from pyinfer.core.dtypes import BFLOAT16, BOOL, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, UINT8, canonical_dtype
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_shape, fail, fail_type
from pyinfer.core.tensor import TensorView
from pyinfer.triton._launch import kernels, next_power_of_2, on_device, one_scale, torch_view, warps
from pyinfer.triton.norm import LARGEST, layouts

__all__ = ["packbits", "quantize_per_token", "scale_and_clamp"]

_FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
_FP8 = (FLOAT8_E4M3, FLOAT8_E5M2)


def scale_and_clamp(x: Any, scale: Any, dtype: Any, out: Any = None) -> Any:
    """``x * scale`` in float32, clamped to what `dtype` can hold and rounded to it. NaN stays NaN.

    Parameters
    ----------
    x
        [..., n], float16, bfloat16 or float32; last axis contiguous, leading axes that collapse into two strides.
    scale
        A number or a float32 tensor of one element (1 / the factor that dequantises).
    dtype
        float8_e4m3fn, float8_e5m2, float16 or bfloat16.
    out
        Where to write; allocated if None.

    Returns
    -------
    torch.Tensor
        x's shape, in `dtype`.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    ImportError
        Without triton.
    """
    op = "triton.quantize.scale_and_clamp"
    module = kernels(op)
    v = torch_view(op, "x", x)
    check_dtype(op, "x", v, _FLOATS)
    target = canonical_dtype(dtype, op, "dtype")
    if target.name not in LARGEST:
        fail_type(op, "dtype", "is no dtype to clamp to", target.name, " or ".join(LARGEST))
    if scale is None:
        fail(op, "scale", "is missing", "None", "a number or a float32 tensor of one element")
    out, o = _output(op, v, target, out)
    _launch(op, module, v, o, one_scale(op, "scale", scale, v), True)
    return out


def quantize_per_token(x: Any, dtype: Any = "float8_e4m3fn", out: Any = None) -> tuple[Any, Any]:
    """Rows divided by their own scales: ``scale = max(|row|) / largest value of dtype``, ``out = row / scale``.

    Parameters
    ----------
    x
        As in `scale_and_clamp`.
    dtype
        float8_e4m3fn or float8_e5m2.
    out
        Where to write; allocated if None.

    Returns
    -------
    out, scale
        x's shape in `dtype`; float32 [...], the factors that dequantise. A row of zeros has scale 0 and stays zero, one with a NaN is all NaN.
    """
    op = "triton.quantize.quantize_per_token"
    module = kernels(op)
    v = torch_view(op, "x", x)
    check_dtype(op, "x", v, _FLOATS)
    target = canonical_dtype(dtype, op, "dtype")
    if target not in _FP8:
        fail_type(op, "dtype", "is no 8-bit float", target.name, "float8_e4m3fn or float8_e5m2")
    if not v.shape:
        fail(op, "x", "has no axis", "a tensor without axes", "[..., n]")
    import torch

    scale = v.obj.new_zeros(tuple(v.shape[:-1]), dtype=torch.float32)
    out, o = _output(op, v, target, out)
    _launch(op, module, v, o, scale, False)
    return out, scale


def packbits(x: Any, bitorder: str = "big") -> Any:
    """`pyinfer.packbits` in Triton."""
    op = "triton.quantize.packbits"
    module = kernels(op)
    v = torch_view(op, "x", x)
    check_dtype(op, "x", v, (BOOL, UINT8))
    check_ndim(op, "x", v, 1)
    if bitorder not in ("big", "little"):
        fail(op, "bitorder", "is no bit order", repr(bitorder), "'big' or 'little'")
    import torch

    count = v.shape[0]
    size = -(-count // 8)
    out = v.obj.new_empty((size,), dtype=torch.uint8)
    if size:
        with on_device(v):
            module.packbits[(-(-size // 256),)](
                v.obj.view(torch.uint8), out, v.strides[0], count, size, BIG=bitorder == "big", BLOCK=256, num_warps=4
            )
    return out


def _output(op: str, x: TensorView, dtype: Any, out: Any) -> tuple[Any, TensorView]:
    if out is None:
        import torch

        out = x.obj.new_empty(tuple(x.shape), dtype=getattr(torch, dtype.name))
    o = torch_view(op, "out", out)
    check_dtype(op, "out", o, (dtype,))
    check_shape(op, "out", o, tuple(x.shape))
    check_same_device(op, {"x": x, "out": o})
    return out, o


def _launch(op: str, module: Any, x: TensorView, o: TensorView, scale: Any, one: bool) -> None:
    (n, inner, *x_at), (_, _, *o_at) = layouts(op, {"x": x, "out": o})
    if not n:
        return
    width = x.shape[-1] if x.shape else 1
    block = min(next_power_of_2(width), 8192)
    with on_device(x):
        module.scale_rows[(n,)](
            x.obj, o.obj, scale, *x_at, *o_at, inner, width, ONE_SCALE=one, LARGEST=LARGEST[o.dtype.name], BLOCK=block, num_warps=warps(block)
        )  # fmt: skip
