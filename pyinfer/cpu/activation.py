"""Gated activations on the CPU. Rows are items."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.fp8 import LARGEST, SCALE_FLOOR, saturate
from pyinfer.cpu.storage import FP8_CARRIERS, flat, from_f32, to_f32
from pyinfer.cpu.vmath import exp, normal_cdf

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_ONE = np.float32(1.0)
_TWO_SQRT_2_PI = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_CUBIC = np.float32(0.044715)


@kernel
def _act_and_mul(begin, end, kind, x, x0, out, o0, width, inner, x_outer, x_inner, o_outer, o_inner):
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        ob = o0 + major * o_outer + minor * o_inner
        gate = x[xb : xb + width]
        factor = x[xb + width : xb + 2 * width]
        target = out[ob : ob + width]
        # One loop per activation: a branch inside would cost the vectorisation.
        if kind == 0:
            for j in range(width):
                v = to_f32(gate[j])
                target[j] = from_f32(v / (_ONE + exp(-v)) * to_f32(factor[j]), out)
        elif kind == 1:
            for j in range(width):
                v = to_f32(gate[j])
                target[j] = from_f32(v * normal_cdf(v) * to_f32(factor[j]), out)
        else:
            for j in range(width):
                v = to_f32(gate[j])
                u = _TWO_SQRT_2_PI * v * (_ONE + _CUBIC * v * v)
                target[j] = from_f32(v / (_ONE + exp(-u)) * to_f32(factor[j]), out)


@kernel
def _act_and_mul_quantized(begin, end, kind, x, x0, out, o0, width, inner, layout, scale, largest, floor, scales):
    # layout: outer and inner strides of x and out. scales: [rows] to write each row's own scale to, or empty: divide by `scale`.
    x_outer, x_inner, o_outer, o_inner = layout
    result = np.empty(width, np.float32)
    own = len(scales) > 0
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        ob = o0 + major * o_outer + minor * o_inner
        gate = x[xb : xb + width]
        factor = x[xb + width : xb + 2 * width]
        target = out[ob : ob + width]
        if kind == 0:
            for j in range(width):
                v = to_f32(gate[j])
                result[j] = v / (_ONE + exp(-v)) * to_f32(factor[j])
        elif kind == 1:
            for j in range(width):
                v = to_f32(gate[j])
                result[j] = v * normal_cdf(v) * to_f32(factor[j])
        else:
            for j in range(width):
                v = to_f32(gate[j])
                u = _TWO_SQRT_2_PI * v * (_ONE + _CUBIC * v * v)
                result[j] = v / (_ONE + exp(-u)) * to_f32(factor[j])
        inverse = _ONE / scale
        if own:
            top = np.float32(0.0)
            for j in range(width):
                v = abs(result[j])
                top = top if top >= v or top != top else v  # NaN stays
            row_scale = top / largest
            row_scale = floor if row_scale < floor else row_scale
            scales[row] = row_scale
            inverse = _ONE / row_scale
        for j in range(width):
            target[j] = saturate(result[j] * inverse, out)


_NO_SCALES = np.empty(0, np.float32)


def act_and_mul_quantized(
    act: str, x: TensorView, out: TensorView, rows: tuple, out_rows: tuple, scale: float, scales: TensorView | None
) -> None:
    """`act_and_mul` as 8-bit floats, divided by `scale`, or by each row's own, which is written to `scales` (float32, as many elements as rows)."""
    n, inner = rows[:2]
    width, name = out.shape[-1], out.dtype.name
    own = _NO_SCALES if scales is None else flat(scales)[0]
    threads.run(
        _act_and_mul_quantized, n, KINDS[act], *flat(x), *flat(out, FP8_CARRIERS[name]), width, inner, (*rows[2:], *out_rows[2:]),
        np.float32(scale), LARGEST[name], SCALE_FLOOR, own, grain=max(1, (1 << 13) // width),
    )  # fmt: skip


def act_and_mul(act: str, x: TensorView, out: TensorView, rows: tuple, out_rows: tuple) -> None:
    """out[r, c] = act(x[r, c]) * x[r, width + c]. `rows` and `out_rows` as `core.rows.row_layout` gives them."""
    n, inner, x_outer, x_inner = rows
    _, _, o_outer, o_inner = out_rows
    width = out.shape[-1]
    grain = max(1, (1 << 13) // width)
    threads.run(
        _act_and_mul, n, KINDS[act], *flat(x), *flat(out), width, inner, x_outer, x_inner, o_outer, o_inner, grain=grain
    )
