"""Chain speculative sampling on the CPU: the twin of cuda_src/sampling/chain.cu.jinja, same ids from the same values and seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.philox import scale_bits, uniform_bits
from pyinfer.cpu.sampling import _as_bits, _mass, _pick, _scale_exponent
from pyinfer.cpu.storage import to_f32

_INF_BITS = 0x7F800000
_ZERO = np.float32(0.0)
_UNIT = np.float32(2.0**-24)


@kernel(fastmath=False)
def _residual(target: Any, draft: Any, with_draft: Any, p: Any) -> Any:
    """p = max(target - draft, 0), or target. Returns the largest value's bits, or -1 if a value is NaN, infinite or negative."""
    top = np.int64(0)
    for i in range(target.shape[0]):
        q = to_f32(target[i]) + _ZERO
        bad = _as_bits(q) < 0 or _as_bits(q) >= _INF_BITS
        if with_draft:
            d = to_f32(draft[i]) + _ZERO
            bad |= _as_bits(d) < 0 or _as_bits(d) >= _INF_BITS
            q = q - d
            if not q > _ZERO:
                q = _ZERO
        if bad:
            return np.int64(-1)
        p[i] = q
        top = max(top, np.int64(_as_bits(q)))
    return top


@kernel(fastmath=False)
def chain_rows(
    begin: Any,
    end: Any,
    draft_memory: Any,
    draft_first: Any,
    draft_stride_request: Any,
    draft_stride_position: Any,
    target_memory: Any,
    target_first: Any,
    target_stride_request: Any,
    target_stride_position: Any,
    vocab: Any,
    draft_ids: Any,
    seed: Any,
    offset: Any,
    word: Any,
    out: Any,
    accepted: Any,
    emitted: Any,
    valid: Any,
) -> None:
    """Requests begin..end-1: draft_ids int64 [B, n]; seed, offset uint64 [B]; word int64 [B], the first draw's place; counters are added to."""
    n = draft_ids.shape[1]
    p = np.empty(vocab, np.float32)
    bits = p.view(np.int32)
    for b in range(begin, end):
        position = n
        for i in range(n):
            token = draft_ids[b, i]
            accept = False
            if 0 <= token < vocab:
                random = uniform_bits(seed[b], offset[b], word[b] + i)
                u = np.float32((random >> np.uint64(40)) + np.uint64(1)) * _UNIT
                d = to_f32(draft_memory[draft_first + b * draft_stride_request + i * draft_stride_position + token])
                q = to_f32(target_memory[target_first + b * target_stride_request + i * target_stride_position + token])
                accept = u * d < q
            if accept:
                accepted[b] += 1
            elif position == n:
                position = i
        emitted[b] += position
        for i in range(n + 1):
            out[b, i] = draft_ids[b, i] if i < position else -1
        t = target_first + b * target_stride_request + position * target_stride_position
        d = draft_first + b * draft_stride_request + min(position, n - 1) * draft_stride_position
        target_row = target_memory[t : t + vocab]
        draft_row = draft_memory[d : d + vocab] if n > 0 else draft_memory[0:0]
        top = _residual(target_row, draft_row, position < n, p)
        if top == 0 and position < n:
            top = _residual(target_row, draft_row, False, p)
        valid[b] = top > 0
        out[b, position] = 0
        if top > 0:
            s = _scale_exponent(top)
            scale = math.ldexp(1.0, s)
            total = np.int64(0)
            for j in range(vocab):
                total += _mass(p[j], scale)
            sought = scale_bits(uniform_bits(seed[b], offset[b], word[b] + n), total)
            out[b, position] = _pick(p, bits, 1, scale, sought)
