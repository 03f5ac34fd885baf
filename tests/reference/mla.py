"""Multi-head latent attention in float64, one query token and one head at a time."""

from __future__ import annotations

import numpy as np


def mla(
    q_nope: np.ndarray, q_pe: np.ndarray, ckv: np.ndarray, kpe: np.ndarray, *, sm_scale: float, causal: bool = False, window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """One request: q_nope [n, heads, latent], q_pe [n, heads, rotary], ckv [kv, latent], kpe [kv, rotary].

    Returns out [n, heads, latent], the base-2 LSE [n, heads], and the weighted mean of |ckv| (what an error of the weights is relative to).
    """
    n, heads, latent = q_nope.shape
    kv = len(ckv)
    out, mean = np.zeros((n, heads, latent)), np.zeros((n, heads, latent))
    lse = np.full((n, heads), -np.inf)
    for i in range(n):
        position = kv - n + i
        last = position if causal else kv - 1
        first = max(position - window_left, 0) if window_left >= 0 else 0
        keys = np.arange(first, min(last, kv - 1) + 1)
        if not len(keys):
            continue
        for h in range(heads):
            logits = (ckv[keys] @ q_nope[i, h] + kpe[keys] @ q_pe[i, h]) * sm_scale
            if logits_soft_cap:
                logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            top = logits.max()
            weights = np.exp(logits - top)
            total = weights.sum()
            out[i, h] = weights @ ckv[keys] / total
            mean[i, h] = weights @ np.abs(ckv[keys]) / total
            lse[i, h] = (top + np.log(total)) / np.log(2)
    return out, lse, mean
