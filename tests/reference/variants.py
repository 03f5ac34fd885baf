"""Attention with a user's functions in float64, from the definition: whole matrices of logits, a head at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def variant_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    request: int = 0,
    causal: bool = False,
    window_left: int = -1,
    sm_scale: float | None = None,
    soft_cap: float = 0.0,
    v_scale: float = 1.0,
    keep: np.ndarray | None = None,
    query: Callable[..., Any] | None = None,
    logits: Callable[..., Any] | None = None,
    mask: Callable[..., Any] | None = None,
    output: Callable[..., Any] | None = None,
    softmax: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] -> out [n, Hq, Dv], base-2 lse [n, Hq].

    The functions take arrays: query(x [n, D], at), logits(s [n, m], at), mask(at) -> [n, m], output(x [n, Dv], at), where `at` is a namespace with
    request, head, kv_head, i [n, 1], j [1, m], position [n, 1], n, m and dim [1, D]. keep: bool [n, m], a custom mask.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, heads, dim = q.shape
    m, kv_heads, dim_vo = v.shape
    i, j = np.arange(n)[:, None], np.arange(m)[None, :]
    position = m - n + i
    seen = np.ones((n, m), bool) if keep is None else np.asarray(keep, bool).reshape(n, m)
    if causal:
        seen = seen & (j <= position)
    if window_left >= 0:
        seen = seen & (j >= position - window_left)
    out, lse = np.zeros((n, heads, dim_vo)), np.full((n, heads), -np.inf)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        at = At(request, head, kv_head, i, j, position, n, m, np.arange(max(dim, dim_vo))[None, :])
        x = q[:, head] if query is None else query(q[:, head], at)
        s = x @ k[:, kv_head].T * (dim**-0.5 if sm_scale is None else sm_scale)
        if logits is not None:
            s = np.broadcast_to(logits(s, at), (n, m))
        if soft_cap > 0:
            s = soft_cap * np.tanh(s / soft_cap)
        visible = seen if mask is None else seen & np.broadcast_to(mask(at), (n, m))
        if softmax:
            for row in range(n):
                chosen = s[row, visible[row]]
                if chosen.size:
                    top = chosen.max()
                    weights = np.exp(chosen - top)
                    out[row, head] = weights @ v[visible[row], kv_head] / weights.sum()
                    lse[row, head] = (top + np.log(weights.sum())) / np.log(2)
        else:
            out[:, head] = np.where(visible, s, 0.0) @ v[:, kv_head]
        out[:, head] *= v_scale
        if output is not None:
            out[:, head] = output(out[:, head], at)
    return out, lse


class At:
    """Where a function is asked."""

    def __init__(self, *values: Any) -> None:
        self.request, self.head, self.kv_head, self.i, self.j, self.position, self.n, self.m, self.dim = values
