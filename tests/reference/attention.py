"""Attention in float64, one score at a time matrix-wise, from the definition: no tiles, no online softmax, no plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Exact(NamedTuple):
    """Attention in float64, and how far a computation in lower precision may be off.

    `mean`: the weighted mean of |v| (times |v_scale|), what an error of the weights is relative to. `weight_error`: how far off, relatively, the weights of a
    row may be if scores are computed with a relative error of `score_epsilon` of the sum of their products' magnitudes; inf where that decides nothing.
    """

    out: np.ndarray
    lse: np.ndarray
    mean: np.ndarray
    score_error: np.ndarray
    weight_error: np.ndarray


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] -> out [n, Hq, Dv], base-2 lse [n, Hq]. A row without keys: 0 and -inf.

    The options are those of `attention_with_bounds`.
    """
    exact = attention_with_bounds(q, k, v, **options)
    return exact.out, exact.lse


def attention_with_bounds(
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
    score_epsilon: float = 0.0,
) -> Exact:
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv].

    mask: bool [n, m], True is seen; rope: (scale, theta); sinks: [Hq]; items: the prefix's length and, for each token behind it, its place in its item.
    A visible score of +inf counts as the largest float32, one of -inf as hidden.
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
        prefix = items[0]
        place = position - prefix
        since = np.array([items[1][p] if 0 <= p < len(items[1]) else 0 for p in place[:, 0]]).reshape(n, 1)
        visible &= (place < 0) | (key < prefix) | (position - key < since)
    slopes = alibi_slopes(num_qo_heads)
    out = np.zeros((n, num_qo_heads, v.shape[2]))
    mean = np.zeros_like(out)
    lse = np.full((n, num_qo_heads), -np.inf)
    score_error, weight_error = np.zeros((n, num_qo_heads)), np.zeros((n, num_qo_heads))
    group = num_qo_heads // num_kv_heads
    for kv_head in range(num_kv_heads if m and n else 0):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        rows, keys, values = q[:, heads].swapaxes(0, 1).reshape(group * n, dim), k[:, kv_head].T, v[:, kv_head]
        logits = (rows @ keys * scale).reshape(group, n, m)
        if score_epsilon:
            error = (np.abs(rows) @ np.abs(keys) * (score_epsilon * abs(scale))).reshape(group, n, m)
        else:
            error = np.zeros_like(logits)
        if alibi:
            bias = np.array(slopes[heads])[:, None, None] * (key - np.arange(n)[:, None])
            logits, error = logits + bias, error + score_epsilon * np.abs(bias)
        if logits_soft_cap > 0:
            if score_epsilon:
                # The slope of tanh, at whichever end of the error's interval it is steepest, and never more than the whole range.
                nearest = np.maximum(np.abs(logits) - error, 0) / logits_soft_cap
                error = np.minimum(error * (1 - np.tanh(nearest) ** 2), 2 * logits_soft_cap)
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        logits = np.where(visible, np.minimum(logits, np.finfo(np.float32).max), -np.inf)
        error = np.where(np.isneginf(logits), 0, error).max(2)
        own = np.full((group, n, 1), -np.inf)
        if sinks is not None:
            own[:] = np.asarray(sinks[heads], np.float64)[:, None, None]
        every = np.concatenate([logits, own], axis=2)  # the sink is one more score, without a value
        live = ~np.isneginf(logits).all(2)
        largest = np.partition(every, -2, axis=2)[..., -2:]
        top = np.where(live, largest[..., 1], 0.0)
        weights = np.where(live[..., None], np.exp(every - top[..., None]), 0)
        total = np.where(live, weights.sum(2), 1)
        share = weights[..., :m] / total[..., None]
        out[:, heads] = (share @ values * v_scale).swapaxes(0, 1)
        mean[:, heads] = (share @ np.abs(values) * abs(v_scale)).swapaxes(0, 1)
        lse[:, heads] = np.where(live, (top + np.log(total)) / np.log(2), -np.inf).T
        with np.errstate(over="ignore", invalid="ignore"):
            decided = top - largest[..., 0] > 2 * error + 100  # the largest takes everything, whatever the rounding
            off = np.where(error < 1, np.expm1(2 * error), np.inf)
        score_error[:, heads] = np.where(live, error, 0).T
        weight_error[:, heads] = np.where(live & ~decided, off, 0).T
    return Exact(out, lse, mean, score_error, weight_error)


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
