"""RMS normalisation on the CPU. Rows are items; a row's sum of squares is taken in float32."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.storage import flat, from_f32, to_f32

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


def _grain(hidden: int, itemsize: int) -> int:
    return max(1, _GRAIN_BYTES // (hidden * itemsize))


def rmsnorm(
    x: TensorView, weight: TensorView, out: TensorView, rows: tuple, out_rows: tuple, eps: float, weight_bias: float
) -> None:
    """out = x / rms(x) * (weight + weight_bias), row by row.

    `rows` and `out_rows` are (number of rows, rows per outer step, outer stride, inner stride) in elements, as `core.rows.row_layout` gives them.
    """
    n, inner, x_outer, x_inner = rows
    _, _, o_outer, o_inner = out_rows
    hidden = x.shape[-1]
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
