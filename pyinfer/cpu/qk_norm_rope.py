"""fused_qk_rmsnorm_rope on the CPU. Tokens are items; the sines of a token serve all its heads."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import move, threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.fp8 import saturate
from pyinfer.cpu.storage import flat, to_f32
from pyinfer.cpu.vmath import sincos_turns


@kernel
def _normalised(source, weight, w0, norm, eps, row):
    # The queries' or the keys' segment of a token as floats.
    n = len(source)
    for j in range(n):
        row[j] = to_f32(source[j])
    if norm:
        total = np.float32(0.0)
        for j in range(n):
            total += row[j] * row[j]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            row[j] = row[j] * (scale * to_f32(weight[w0 + j]))


@kernel
def _rotated(row, heads, pairs, interleave, cosine, sine, factor, target, out):
    for h in range(heads):
        at = h * 2 * pairs
        for i in range(pairs):
            first, second = (at + 2 * i, at + 2 * i + 1) if interleave else (at + i, at + pairs + i)
            a, b = row[first], row[second]
            target[first] = saturate((a * cosine[i] - b * sine[i]) * factor, out)
            target[second] = saturate((b * cosine[i] + a * sine[i]) * factor, out)


@kernel
def _qk_norm_rope(
    begin,
    end,
    x,
    x0,
    inner,
    x_outer,
    x_inner,
    q_weight,
    q_w0,
    k_weight,
    k_w0,
    q,
    q0,
    k,
    k0,
    v,
    v0,
    heads,
    grid,
    axes,
    frequency,
    interleave,
    norm,
    eps,
    factors,
):
    # heads: of q, k and v. grid: heights and widths of a frame, places in all. axes: the first pairs that turn with the height and with the width.
    # factors: of cosines and sines, of queries and keys, of values.
    pairs = len(frequency)
    q_heads, k_heads, v_heads = heads
    height, width, places = grid
    nq, nk, nv = q_heads * 2 * pairs, k_heads * 2 * pairs, v_heads * 2 * pairs
    row = np.empty(max(nq, nk), np.float32)
    cosine, sine = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for token in range(begin, end):
        base = x0 + token // inner * x_outer + token % inner * x_inner
        place = token % places
        for i in range(pairs):
            coordinate = (
                place % width
                if i >= axes[1]
                else place // width % height
                if i >= axes[0]
                else place // (height * width)
            )
            s, c = sincos_turns(np.uint64(coordinate) * frequency[i])
            cosine[i] = c * factors[0]
            sine[i] = s * factors[0]
        _normalised(x[base : base + nq], q_weight, q_w0, norm, eps, row)
        _rotated(row, q_heads, pairs, interleave, cosine, sine, factors[1], q[q0 + token * nq :][:nq], q)
        _normalised(x[base + nq : base + nq + nk], k_weight, k_w0, norm, eps, row)
        _rotated(row, k_heads, pairs, interleave, cosine, sine, factors[1], k[k0 + token * nk :][:nk], k)
        source, target = x[base + nq + nk : base + nq + nk + nv], v[v0 + token * nv :][:nv]
        for j in range(nv):
            target[j] = saturate(to_f32(source[j]) * factors[2], v)


def qk_norm_rope(
    qkv: TensorView,
    weights: tuple[TensorView, TensorView],
    outs: tuple[TensorView, TensorView, TensorView],
    rows: tuple[int, int, int, int],
    heads: tuple[int, int, int],
    grid: tuple[int, int, int],
    axes: tuple[int, int],
    frequency: np.ndarray,
    interleave: bool,
    norm: bool,
    eps: float,
    factors: tuple[float, float, float],
) -> None:
    """What `pyinfer.fused_qk_rmsnorm_rope` says. `rows` as `core.rows.row_layout` gives them;
    `grid`: height, width, places of a sequence; outputs contiguous.
    """
    n, inner, x_outer, x_inner = rows
    written = [piece for out in outs for piece in flat(out, move.carrier(out))]
    threads.run(
        _qk_norm_rope, n, *flat(qkv, move.carrier(qkv)), inner, x_outer, x_inner, *flat(weights[0]), *flat(weights[1]), *written, heads, grid, axes,
        frequency, interleave, norm, np.float32(eps), tuple(np.float32(f) for f in factors), grain=max(1, (1 << 13) // qkv.shape[-1]),
    )  # fmt: skip
