"""Merging attention states on the CPU: rows are (token, head) pairs."""

from __future__ import annotations

import math

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.attention import flat
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.softmax import U
from pyinfer.cpu.storage import from_f32, to_f32

_GRAIN = 64  # rows worth giving to a thread
_NO_MASK = np.empty(0, np.uint8)
_NEG_INF = np.float32(-np.inf)


@kernel
def _merge_state(begin, end, heads, dim, v_a, s_a, v_b, s_b, v_out, s_out, mask, strides):
    dim = U(dim)
    for row in range(begin, end):
        token = U(row // heads)
        head = U(row % heads)
        if len(mask) > 0 and mask[row // heads] == 0:
            continue
        a = s_a[token * strides[2] + head * strides[3]]
        b = s_b[token * strides[6] + head * strides[7]]
        top = max(a, b)
        w_a = np.float32(0)
        w_b = np.float32(0)
        if top != _NEG_INF:
            w_a = np.float32(2.0 ** np.float64(a - top))
            w_b = np.float32(2.0 ** np.float64(b - top))
        total = w_a + w_b
        scale = np.float32(0)
        if total > 0:
            scale = np.float32(1) / total
        at_a = token * strides[0] + head * strides[1]
        at_b = token * strides[4] + head * strides[5]
        at = token * strides[8] + head * strides[9]
        for i in range(dim):
            # A state without keys counts for nothing, whatever its v holds.
            x = w_a * to_f32(v_a[at_a + i]) if w_a > 0 else np.float32(0)
            y = w_b * to_f32(v_b[at_b + i]) if w_b > 0 else np.float32(0)
            v_out[at + i] = from_f32((x + y) * scale, v_out)
        merged = _NEG_INF
        if top != _NEG_INF:
            merged = np.float32(np.float64(top) + math.log2(np.float64(total)))
        s_out[token * strides[10] + head * strides[11]] = merged


@kernel
def _merge_states(begin, end, heads, dim, states, v, s, v_out, s_out, strides):
    dim = U(dim)
    acc = np.empty(dim, np.float32)
    for row in range(begin, end):
        token = U(row // heads)
        head = U(row % heads)
        scores = token * strides[3] + head * strides[5]
        values = token * strides[0] + head * strides[2]
        top = _NEG_INF
        for k in range(U(states)):
            top = max(top, s[scores + k * strides[4]])
        for i in range(dim):
            acc[i] = 0
        total = np.float32(0)
        merged = _NEG_INF
        scale = np.float32(0)
        if top != _NEG_INF:
            for k in range(U(states)):
                weight = np.float32(2.0 ** np.float64(s[scores + k * strides[4]] - top))
                total += weight
                if weight > 0:  # a state without keys counts for nothing, whatever its v holds
                    at = values + k * strides[1]
                    for i in range(dim):
                        acc[i] += weight * to_f32(v[at + i])
            scale = np.float32(1) / total
            merged = np.float32(np.float64(top) + math.log2(np.float64(total)))
        at = token * strides[6] + head * strides[7]
        for i in range(dim):
            v_out[at + i] = from_f32(acc[i] * scale, v_out)
        s_out[token * strides[8] + head * strides[9]] = merged


def merge_state(
    v_a: TensorView,
    s_a: TensorView,
    v_b: TensorView,
    s_b: TensorView,
    v_out: TensorView,
    s_out: TensorView,
    mask: TensorView | None,
) -> None:
    """Merge two states of checked shapes into v_out, s_out, which may be v_a, s_a."""
    n, heads, dim = v_a.shape
    strides = np.array([s for t in (v_a, s_a, v_b, s_b, v_out, s_out) for s in t.strides[:2]], np.int64).view(np.uint64)
    chosen = _NO_MASK
    if mask is not None:
        from pyinfer.core.tensor import as_numpy

        chosen = np.ascontiguousarray(as_numpy(mask)).view(np.uint8)
    arrays = [flat(t) for t in (v_a, s_a, v_b, s_b, v_out, s_out)]
    threads.run(_merge_state, n * heads, heads, dim, *arrays, chosen, strides, grain=_GRAIN)


def merge_states(v: TensorView, s: TensorView, v_out: TensorView, s_out: TensorView) -> None:
    """Merge the states of axis 1 of v and s, of checked shapes, into v_out, s_out."""
    n, states, heads, dim = v.shape
    strides = np.array([*v.strides[:3], *s.strides[:3], *v_out.strides[:2], *s_out.strides[:2]], np.int64).view(
        np.uint64
    )
    threads.run(
        _merge_states, n * heads, heads, dim, states, flat(v), flat(s), flat(v_out), flat(s_out), strides, grain=_GRAIN
    )
