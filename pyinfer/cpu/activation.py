"""Gated activations on the CPU. Rows are items."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.storage import flat, from_f32, to_f32
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


def act_and_mul(act: str, x: TensorView, out: TensorView, rows: tuple, out_rows: tuple) -> None:
    """out[r, c] = act(x[r, c]) * x[r, width + c]. `rows` and `out_rows` as `core.rows.row_layout` gives them."""
    n, inner, x_outer, x_inner = rows
    _, _, o_outer, o_inner = out_rows
    width = out.shape[-1]
    grain = max(1, (1 << 13) // width)
    threads.run(
        _act_and_mul, n, KINDS[act], *flat(x), *flat(out), width, inner, x_outer, x_inner, o_outer, o_inner, grain=grain
    )
