"""Rows of heads moved from one place to another on the CPU, as they are or rounded on the way. Tokens are items."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.fp8 import saturate
from pyinfer.cpu.storage import CARRIERS, FP8_CARRIERS, flat, to_f32

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bits are moved, whatever they mean


@kernel
def _move_bits(begin, end, sources, targets, heads, dim, x, x0, x_head, out, o0, o_head):
    for t in range(begin, end):
        if targets[t] < 0:
            continue
        for h in range(heads):
            to = o0 + targets[t] + h * o_head
            row = out[to : to + dim]
            if sources[t] < 0:
                row[:] = 0
            else:
                at = x0 + sources[t] + h * x_head
                source = x[at : at + dim]
                for j in range(dim):
                    row[j] = source[j]


@kernel
def _move_rounded(begin, end, sources, targets, heads, dim, x, x0, x_head, out, o0, o_head, factors):
    step = 1 if len(factors) > 1 else 0
    for t in range(begin, end):
        if targets[t] < 0:
            continue
        for h in range(heads):
            to = o0 + targets[t] + h * o_head
            row = out[to : to + dim]
            if sources[t] < 0:
                row[:] = 0
            else:
                at = x0 + sources[t] + h * x_head
                source = x[at : at + dim]
                factor = factors[h * step]
                for j in range(dim):
                    row[j] = saturate(to_f32(source[j]) * factor, out)


def carrier(view: TensorView) -> np.dtype:
    """What kernels see of a tensor's elements, 8-bit floats included."""
    return np.dtype(FP8_CARRIERS.get(view.dtype.name) or CARRIERS[view.dtype.name])


def row_bases(view: TensorView) -> np.ndarray:
    """Where the rows of [tokens, heads, dim] begin, in elements from the first."""
    return np.arange(view.shape[0], dtype=np.int64) * view.strides[0]


def _grain(view: TensorView) -> int:
    return max(1, (1 << 14) // max(1, view.shape[-1] * view.shape[-2]))


def bits(source: TensorView, target: TensorView, sources: np.ndarray, targets: np.ndarray) -> None:
    """Heads (the last but one axis of both) from `sources` to `targets`.

    Both say where each token begins, in elements from its tensor's first. No target (-1): left out; no source: zeros.
    """
    kind = _BITS[source.dtype.itemsize]
    heads, dim = source.shape[-2:]
    threads.run(
        _move_bits, len(sources), sources, targets, heads, dim,
        *flat(source, kind), source.strides[-2], *flat(target, kind), target.strides[-2], grain=_grain(source),
    )  # fmt: skip


def rounded(
    source: TensorView,
    target: TensorView,
    sources: np.ndarray,
    targets: np.ndarray,
    target_stride_head: int,
    factors: np.ndarray,
) -> None:
    """As `bits`, times a factor (float32 [1], or one a head) and rounded to the target's dtype, 8-bit floats saturating."""
    heads, dim = source.shape[-2:]
    threads.run(
        _move_rounded, len(sources), sources, targets, heads, dim, *flat(source, carrier(source)), source.strides[-2],
        *flat(target, carrier(target)), target_stride_head, np.asarray(factors, np.float32), grain=_grain(source),
    )  # fmt: skip
