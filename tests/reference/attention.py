"""Attention in float64, one score at a time matrix-wise, from the definition: no tiles, no online softmax, no plan."""

from __future__ import annotations

import numpy as np


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] -> out [n, Hq, Dv], base-2 lse [n, Hq]. A row without keys: 0 and -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, num_qo_heads, dim = q.shape
    m, num_kv_heads, _ = k.shape
    scale = dim**-0.5 if sm_scale is None else sm_scale
    position = m - n + np.arange(n)[:, None]
    key = np.arange(m)[None, :]
    visible = np.ones((n, m), bool)
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    out = np.zeros((n, num_qo_heads, v.shape[2]))
    lse = np.full((n, num_qo_heads), -np.inf)
    for h in range(num_qo_heads):
        kv_head = h // (num_qo_heads // num_kv_heads)
        logits = q[:, h] @ k[:, kv_head].T * scale
        if logits_soft_cap > 0:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        for i in range(n):
            row = logits[i, visible[i]]
            if row.size == 0 or row.max() == -np.inf:
                continue
            weights = np.exp(row - row.max())
            out[i, h] = weights @ v[visible[i], kv_head] / weights.sum() * v_scale
            lse[i, h] = (row.max() + np.log(weights.sum())) / np.log(2)
    return out, lse


def gather_pages(
    cache: np.ndarray, kv_layout: str, indptr: np.ndarray, indices: np.ndarray, last_page_len: np.ndarray, request: int
) -> np.ndarray:
    """The keys (or values) of one request, [kv_len, heads, dim], out of a 4-D cache."""
    pages = indices[indptr[request] : indptr[request + 1]]
    rows = []
    for i, page in enumerate(pages):
        block = cache[page] if kv_layout == "NHD" else cache[page].transpose(1, 0, 2)
        rows.append(block[: last_page_len[request]] if i == len(pages) - 1 else block)
    if not rows:
        heads = cache.shape[2] if kv_layout == "NHD" else cache.shape[1]
        return np.zeros((0, heads, cache.shape[3]), cache.dtype)
    return np.concatenate(rows)


def merge_states(v: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge k partial states: v [n, k, H, D], base-2 s [n, k, H] -> [n, H, D], [n, H]. All -inf (or k = 0): 0 and -inf."""
    v, s = np.asarray(v, np.float64), np.asarray(s, np.float64)
    n, _, heads, dim = v.shape
    out = np.zeros((n, heads, dim))
    lse = np.full((n, heads), -np.inf)
    for i in range(n):
        for h in range(heads):
            top = max(s[i, :, h], default=-np.inf)
            if top == -np.inf:
                continue
            weights = np.exp2(s[i, :, h] - top)
            live = weights > 0
            out[i, h] = weights[live] @ v[i, live, h] / weights.sum()
            lse[i, h] = top + np.log2(weights.sum())
    return out, lse
