"""RMS and layer normalisation on the CPU. Rows are items; sums over a row are taken in float32."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.fp8 import LARGEST, SCALE_FLOOR, saturate
from pyinfer.cpu.storage import FP8_CARRIERS, flat, from_f32, to_f32
from pyinfer.cpu.vmath import exp

_GRAIN_BYTES = 1 << 15  # what a thread should have to do: some 10 us


@kernel
def _rmsnorm(begin, end, x, x0, weight, w0, out, o0, hidden, inner, x_outer, x_inner, o_outer, o_inner, eps, bias):
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        ob = o0 + major * o_outer + minor * o_inner
        source = x[xb : xb + hidden]
        target = out[ob : ob + hidden]
        w = weight[w0 : w0 + hidden]
        total = np.float32(0.0)
        for j in range(hidden):
            v = to_f32(source[j])
            total += v * v
        scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + eps)
        for j in range(hidden):
            target[j] = from_f32(to_f32(source[j]) * scale * (to_f32(w[j]) + bias), out)


@kernel
def _fused_add_rmsnorm(
    begin, end, x, x0, residual, r0, weight, w0, hidden, inner, x_outer, x_inner, r_outer, r_inner, eps, bias
):
    sums = np.empty(hidden, np.float32)  # the row before rounding to the residual's type: that is what is normalised
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        rb = r0 + major * r_outer + minor * r_inner
        source = x[xb : xb + hidden]
        res = residual[rb : rb + hidden]
        w = weight[w0 : w0 + hidden]
        total = np.float32(0.0)
        for j in range(hidden):
            v = to_f32(source[j]) + to_f32(res[j])
            sums[j] = v
            total += v * v
        scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + eps)
        for j in range(hidden):
            v = sums[j]
            res[j] = from_f32(v, residual)
            source[j] = from_f32(v * scale * (to_f32(w[j]) + bias), x)


@kernel
def _quantized(
    begin,
    end,
    x,
    x0,
    residual,
    r0,
    add,
    weight,
    w0,
    out,
    o0,
    hidden,
    inner,
    layout,
    eps,
    silu,
    scale,
    largest,
    floor,
    scales,
):
    # layout: outer and inner strides of x, residual and out. scales: [rows] to write each row's own scale to, or empty: divide by `scale`.
    x_outer, x_inner, r_outer, r_inner, o_outer, o_inner = layout
    result = np.empty(hidden, np.float32)
    own = len(scales) > 0
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        source = x[x0 + major * x_outer + minor * x_inner :][:hidden]
        target = out[o0 + major * o_outer + minor * o_inner :][:hidden]
        w = weight[w0 : w0 + hidden]
        total = np.float32(0.0)
        if add:
            res = residual[r0 + major * r_outer + minor * r_inner :][:hidden]
            for j in range(hidden):
                v = to_f32(source[j]) + to_f32(res[j])
                result[j] = v
                total += v * v
            for j in range(hidden):
                res[j] = from_f32(result[j], residual)
        else:
            for j in range(hidden):
                v = to_f32(source[j])
                result[j] = v
                total += v * v
        rms = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + eps)
        for j in range(hidden):
            result[j] = result[j] * rms * to_f32(w[j])
        if silu:
            for j in range(hidden):
                v = result[j]
                result[j] = v / (np.float32(1.0) + exp(-v))
        inverse = np.float32(1.0) / scale
        if own:
            top = np.float32(0.0)
            for j in range(hidden):
                v = abs(result[j])
                # NaN is not less than, and stays: the comparison is the other way round once it is there.
                top = top if top >= v or top != top else v
            row_scale = top / largest
            row_scale = floor if row_scale < floor else row_scale
            scales[row] = row_scale
            inverse = np.float32(1.0) / row_scale
        for j in range(hidden):
            target[j] = saturate(result[j] * inverse, out)


@kernel
def _rmsnorm_silu(begin, end, x, x0, weight, w0, out, o0, hidden, inner, x_outer, x_inner, o_outer, o_inner, eps):
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        ob = o0 + major * o_outer + minor * o_inner
        source = x[xb : xb + hidden]
        target = out[ob : ob + hidden]
        w = weight[w0 : w0 + hidden]
        total = np.float32(0.0)
        for j in range(hidden):
            v = to_f32(source[j])
            total += v * v
        scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + eps)
        for j in range(hidden):
            v = to_f32(source[j]) * scale * to_f32(w[j])
            target[j] = from_f32(v / (np.float32(1.0) + exp(-v)), out)


@kernel
def _layernorm(
    begin, end, x, x0, weight, w0, bias, b0, out, o0, hidden, inner, x_outer, x_inner, o_outer, o_inner, eps
):
    for row in range(begin, end):
        major, minor = row // inner, row % inner
        xb = x0 + major * x_outer + minor * x_inner
        ob = o0 + major * o_outer + minor * o_inner
        source = x[xb : xb + hidden]
        target = out[ob : ob + hidden]
        w, b = weight[w0 : w0 + hidden], bias[b0 : b0 + hidden]
        total = np.float32(0.0)
        for j in range(hidden):
            total += to_f32(source[j])
        mean = total / np.float32(hidden)
        total = np.float32(0.0)
        for j in range(hidden):
            v = to_f32(source[j]) - mean
            total += v * v
        scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + eps)
        for j in range(hidden):
            target[j] = from_f32((to_f32(source[j]) - mean) * scale * to_f32(w[j]) + to_f32(b[j]), out)


def _grain(hidden: int, itemsize: int) -> int:
    return max(1, _GRAIN_BYTES // (hidden * itemsize))


def rmsnorm(
    x: TensorView,
    weight: TensorView,
    out: TensorView,
    rows: tuple,
    out_rows: tuple,
    eps: float,
    weight_bias: float,
    silu: bool = False,
) -> None:
    """out = x / rms(x) * (weight + weight_bias), row by row; passed through silu, if asked for (then without weight_bias).

    `rows` and `out_rows` are (number of rows, rows per outer step, outer stride, inner stride) in elements, as `core.rows.row_layout` gives them.
    """
    n, inner, x_outer, x_inner = rows
    _, _, o_outer, o_inner = out_rows
    hidden = x.shape[-1]
    if silu:
        threads.run(
            _rmsnorm_silu, n, *flat(x), *flat(weight), *flat(out), hidden, inner, x_outer, x_inner, o_outer, o_inner,
            np.float32(eps), grain=_grain(hidden, x.dtype.itemsize),
        )  # fmt: skip
        return
    threads.run(
        _rmsnorm, n, *flat(x), *flat(weight), *flat(out), hidden, inner, x_outer, x_inner, o_outer, o_inner,
        np.float32(eps), np.float32(weight_bias), grain=_grain(hidden, x.dtype.itemsize),
    )  # fmt: skip


def fused_add_rmsnorm(
    x: TensorView,
    residual: TensorView,
    weight: TensorView,
    rows: tuple,
    residual_rows: tuple,
    eps: float,
    weight_bias: float,
) -> None:
    """In place: residual += x, then x = residual / rms(residual) * (weight + weight_bias), the norm taken of the float32 sum before it is rounded."""
    n, inner, x_outer, x_inner = rows
    _, _, r_outer, r_inner = residual_rows
    hidden = x.shape[-1]
    threads.run(
        _fused_add_rmsnorm, n, *flat(x), *flat(residual), *flat(weight), hidden, inner, x_outer, x_inner, r_outer, r_inner,
        np.float32(eps), np.float32(weight_bias), grain=_grain(hidden, x.dtype.itemsize),
    )  # fmt: skip


_NO_SCALES = np.empty(0, np.float32)


def quantized(
    x: TensorView,
    residual: TensorView | None,
    weight: TensorView,
    out: TensorView,
    layouts: list[tuple[int, int, int, int]],
    eps: float,
    scale: float,
    scales: TensorView | None,
    silu: bool,
) -> None:
    """out = x / rms(x) * weight / scale as 8-bit floats, of x + residual (which is written) if there is one.

    `layouts`: of x, residual (if given) and out, as `core.rows.row_layout` gives them. `scales`: float32 of as many elements as rows, to which each
    row's own scale is
    written instead of using `scale`.
    """
    n, inner = layouts[0][:2]
    hidden = x.shape[-1]
    name = out.dtype.name
    strides = [s for layout in layouts for s in layout[2:]]
    layout = tuple(strides) if residual is not None else (*strides[:2], 0, 0, *strides[2:])
    own = _NO_SCALES if scales is None else flat(scales)[0]
    threads.run(
        _quantized, n, *flat(x), *flat(x if residual is None else residual), residual is not None, *flat(weight),
        *flat(out, FP8_CARRIERS[name]), hidden, inner, layout, np.float32(eps), silu, np.float32(scale), LARGEST[name], SCALE_FLOOR, own,
        grain=_grain(hidden, x.dtype.itemsize),
    )  # fmt: skip


def layernorm(
    x: TensorView,
    weight: TensorView,
    bias: TensorView,
    out: TensorView,
    rows: tuple,
    out_rows: tuple,
    eps: float,
) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, row by row. `rows` and `out_rows` as in `rmsnorm`."""
    n, inner, x_outer, x_inner = rows
    _, _, o_outer, o_inner = out_rows
    hidden = x.shape[-1]
    threads.run(
        _layernorm, n, *flat(x), *flat(weight), *flat(bias), *flat(out), hidden, inner, x_outer, x_inner, o_outer, o_inner,
        np.float32(eps), grain=_grain(hidden, x.dtype.itemsize),
    )  # fmt: skip
