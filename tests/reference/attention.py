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
    mask: np.ndarray | None = None,
    alibi: bool = False,
    rope: tuple[float, float] | None = None,
    sinks: np.ndarray | None = None,
    items: tuple[int, list[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] -> out [n, Hq, Dv], base-2 lse [n, Hq]. A row without keys: 0 and -inf.

    mask: bool [n, m], True is seen; rope: (scale, theta); sinks: [Hq]; items: the prefix's length and, for each token behind it, its place in its item.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if rope is not None:
        q, k = rotated(q, k.shape[0] - q.shape[0], *rope), rotated(k, 0, *rope)
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
    if mask is not None:
        visible &= np.asarray(mask, bool).reshape(n, m)
    if items is not None:
        for i, j in np.ndindex(n, m):
            prefix, place = items[0], int(position[i, 0]) - items[0]
            if place >= 0 and j >= prefix:
                since = items[1][place] if place < len(items[1]) else 0
                visible[i, j] &= int(position[i, 0]) - j < since
    slopes = alibi_slopes(num_qo_heads)
    out = np.zeros((n, num_qo_heads, v.shape[2]))
    lse = np.full((n, num_qo_heads), -np.inf)
    for h in range(num_qo_heads):
        kv_head = h // (num_qo_heads // num_kv_heads)
        logits = q[:, h] @ k[:, kv_head].T * scale
        if alibi:
            logits = logits + slopes[h] * (key - np.arange(n)[:, None])
        if logits_soft_cap > 0:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        for i in range(n):
            row = logits[i, visible[i]]
            if row.size == 0 or row.max() == -np.inf:
                continue
            top = row.max() if sinks is None else max(row.max(), float(sinks[h]))
            weights = np.exp(row - top)
            total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[h]) - top))
            out[i, h] = weights @ v[visible[i], kv_head] / total * v_scale
            lse[i, h] = (top + np.log(total)) / np.log(2)
    return out, lse


def alibi_slopes(heads: int) -> list[float]:
    """By the paper's recursion: the slopes of the largest power of two below, then every second one of twice that."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]


def rotated(x: np.ndarray, first: int, scale: float, theta: float) -> np.ndarray:
    """x [tokens, heads, dim] with token t rotated as position first + t, in halves."""
    dim = x.shape[2]
    angle = (first + np.arange(len(x)))[:, None] * np.array(
        [theta ** (-2.0 * i / dim) / scale for i in range(dim // 2)]
    )
    z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


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
