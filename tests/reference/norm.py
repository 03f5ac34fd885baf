"""RMS normalisation in float64."""

from __future__ import annotations

import numpy as np


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def fused_add_rmsnorm(
    x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """(normalised sum, sum), neither rounded."""
    total = x.astype(np.float64) + residual.astype(np.float64)
    return rmsnorm(total, weight, eps), total


def layernorm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last axis."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight.astype(np.float64) + bias.astype(np.float64)


def qk_norm_rope(
    qkv: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray] | None,
    grid: tuple[int, int, int],
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    eps: float = 1e-6,
    base: float = 1e4,
    interleave: bool = True,
    yarn: tuple[float, float, float] | None = None,
    attention_factor: float = 1.0,
) -> list[np.ndarray]:
    """q, k and v [tokens, heads, head_dim] of rows [tokens, ...]: q and k normalised over all heads (unless `weights` is None) and
    turned by frame, height and width.

    `yarn`: (factor, low, high).
    """
    dim, tokens = sum(channels), len(qkv)
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    coordinates = np.tile(coordinates, (tokens // len(coordinates), 1)).astype(np.float64)
    angles = []
    for axis, n in enumerate(channels):
        for j in range(n // 2):
            f = base ** (-2.0 * j / n)
            if yarn is not None:
                factor, low, high = yarn
                share = min(max((j - low) / (high - low), 0.0), 1.0)
                f = share * f / factor + (1.0 - share) * f
            angles.append(coordinates[:, axis] * f)
    turn = attention_factor * np.exp(1j * np.stack(angles, -1))[:, None, :]
    parts = np.split(qkv.astype(np.float64), np.cumsum(heads)[:2] * dim, axis=1)
    results = []
    for i, (part, n) in enumerate(zip(parts, heads, strict=True)):
        if i == 2:
            results.append(part.reshape(tokens, n, dim))
            continue
        x = (part if weights is None else rmsnorm(part, weights[i], eps)).reshape(tokens, n, dim)
        pairs = (
            x.reshape(tokens, n, dim // 2, 2) if interleave else np.stack([x[..., : dim // 2], x[..., dim // 2 :]], -1)
        )
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        turned = np.stack([z.real, z.imag], -1)
        results.append(turned.reshape(x.shape) if interleave else np.concatenate([z.real, z.imag], -1))
    return results
