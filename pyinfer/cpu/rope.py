"""Rotary position embedding on the CPU. Tokens are items; the sines of a token serve all its heads."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import move, threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.fp8 import saturate
from pyinfer.cpu.storage import flat, from_f32, to_f32
from pyinfer.cpu.vmath import sincos_turns


@kernel
def _rotate_heads(
    x, base, out, out_base, heads, stride, out_stride, pairs, head_dim, interleave, copy_tail, cosine, sine
):
    for h in range(heads):
        row = x[base + h * stride : base + h * stride + head_dim]
        target = out[out_base + h * out_stride : out_base + h * out_stride + head_dim]
        if interleave:
            for i in range(pairs):
                a, b = to_f32(row[2 * i]), to_f32(row[2 * i + 1])
                target[2 * i] = from_f32(a * cosine[i] - b * sine[i], out)
                target[2 * i + 1] = from_f32(b * cosine[i] + a * sine[i], out)
        else:
            low, high = row[:pairs], row[pairs : 2 * pairs]
            target_low, target_high = target[:pairs], target[pairs : 2 * pairs]
            for i in range(pairs):
                a, b = to_f32(low[i]), to_f32(high[i])
                target_low[i] = from_f32(a * cosine[i] - b * sine[i], out)
                target_high[i] = from_f32(b * cosine[i] + a * sine[i], out)
        if copy_tail:
            for i in range(2 * pairs, head_dim):
                target[i] = row[i]


@kernel
def _rope(
    begin,
    end,
    positions,
    frequency,
    cos_sin,
    interleave,
    copy_tail,
    head_dim,
    q,
    q0,
    qo,
    qo0,
    q_layout,
    k,
    k0,
    ko,
    ko0,
    k_layout,
):
    # layout: (heads, stride_n, stride_h, out_stride_n, out_stride_h)
    from_cache = cos_sin.shape[0] > 0
    pairs = cos_sin.shape[1] // 2 if from_cache else frequency.shape[0]
    cosine, sine = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for token in range(begin, end):
        position = positions[token]
        if from_cache:
            for i in range(pairs):
                cosine[i] = cos_sin[position, i]
                sine[i] = cos_sin[position, pairs + i]
        else:
            turn = np.uint64(position)  # a negative position wraps, and so does its angle
            for i in range(pairs):
                s, c = sincos_turns(turn * frequency[i])
                cosine[i] = c
                sine[i] = s
        heads, n, h, out_n, out_h = q_layout
        _rotate_heads(
            q,
            q0 + token * n,
            qo,
            qo0 + token * out_n,
            heads,
            h,
            out_h,
            pairs,
            head_dim,
            interleave,
            copy_tail,
            cosine,
            sine,
        )
        heads, n, h, out_n, out_h = k_layout
        _rotate_heads(
            k,
            k0 + token * n,
            ko,
            ko0 + token * out_n,
            heads,
            h,
            out_h,
            pairs,
            head_dim,
            interleave,
            copy_tail,
            cosine,
            sine,
        )


_NO_TABLE = np.zeros(0, np.uint64)
_NO_CACHE = np.zeros((0, 2), np.float32)


def rope(
    q: TensorView,
    k: TensorView,
    q_out: TensorView,
    k_out: TensorView,
    positions: np.ndarray,
    *,
    frequency: np.ndarray | None = None,
    cos_sin_cache: np.ndarray | None = None,
    interleave: bool,
    in_place: bool,
) -> None:
    """Rotate q [tokens, heads, head_dim] and k by `positions` (integers [tokens]).

    Angles come from `frequency` (`jit.rope.frequency_table`), or cosines and sines from `cos_sin_cache` (float32 [max_position, rotary_dim]).
    """
    head_dim = q.shape[2]
    layouts = [(x.shape[1], *x.strides[:2], *out.strides[:2]) for x, out in ((q, q_out), (k, k_out))]
    grain = max(1, (1 << 13) // max(1, (q.shape[1] + k.shape[1]) * head_dim))
    threads.run(
        _rope, q.shape[0], positions.astype(np.int64, copy=False),
        _NO_TABLE if frequency is None else frequency, _NO_CACHE if cos_sin_cache is None else cos_sin_cache,
        interleave, not in_place, head_dim, *flat(q), *flat(q_out), layouts[0], *flat(k), *flat(k_out), layouts[1],
        grain=grain,
    )  # fmt: skip


def positions_of_rows(indptr: np.ndarray, offsets: np.ndarray, rows: int) -> np.ndarray:
    """Position of every row: its place in its request plus the request's offset; 0 for rows of no request."""
    positions = np.zeros(rows, np.int64)
    row = np.arange(rows)
    request = np.searchsorted(indptr[:-1], row, side="right") - 1
    inside = request >= 0
    inside[inside] = row[inside] < indptr[request[inside] + 1]
    positions[inside] = row[inside] - indptr[request[inside]] + offsets[request[inside]]
    return positions


@kernel
def _rope_rounded(
    begin, end, positions, cos_sin, interleave, factor, sources, targets, heads, pairs, x, x0, x_head, out, o0, o_head
):
    rotated = np.empty(2 * pairs, np.float32)
    for token in range(begin, end):
        if targets[token] < 0:
            continue
        angles = cos_sin[positions[token]]
        for h in range(heads):
            at, to = x0 + sources[token] + h * x_head, o0 + targets[token] + h * o_head
            row = x[at : at + 2 * pairs]
            for i in range(pairs):
                first, second = (2 * i, 2 * i + 1) if interleave else (i, pairs + i)
                a, b = to_f32(row[first]), to_f32(row[second])
                rotated[first] = a * angles[i] - b * angles[pairs + i]
                rotated[second] = b * angles[i] + a * angles[pairs + i]
            target = out[to : to + 2 * pairs]
            for i in range(2 * pairs):
                target[i] = saturate(rotated[i] * factor, out)


def _target_bases(target: TensorView, places: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    from pyinfer.cpu.page import cache_bases

    return move.row_bases(target) if places is None else cache_bases(target, places)


def rope_rounded(
    x: TensorView,
    out: TensorView,
    positions: np.ndarray,
    cos_sin_cache: np.ndarray,
    interleave: bool,
    factor: float,
    places: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Heads x [tokens, heads, rotary_dim] rotated, times a factor, rounded to out's dtype (8-bit floats saturate).

    `out` is as x, or with `places` (page, -1 for nowhere, and slot of every token) a cache [pages, page_size, heads, rotary_dim].
    """
    heads, dim = x.shape[1:]
    threads.run(
        _rope_rounded, x.shape[0], positions.astype(np.int64, copy=False), np.ascontiguousarray(cos_sin_cache), interleave, np.float32(factor),
        move.row_bases(x), _target_bases(out, places), heads, dim // 2, *flat(x, move.carrier(x)), x.strides[1],
        *flat(out, move.carrier(out)), out.strides[-2], grain=max(1, (1 << 13) // max(1, heads * dim)),
    )  # fmt: skip


def move_rounded(x: TensorView, out: TensorView, factor: float, places: tuple[np.ndarray, np.ndarray] | None) -> None:
    """As `rope_rounded`, not rotated."""
    move.rounded(x, out, move.row_bases(x), _target_bases(out, places), out.strides[-2], np.full(1, factor, np.float32))
