"""Rotary position embedding in float64, by complex multiplication (the operators rotate reals)."""

from __future__ import annotations

import math

import numpy as np


def frequencies(rotary_dim: int, theta: float = 1e4, scale: float = 1.0) -> np.ndarray:
    """Radians per position of every pair."""
    return np.array([theta ** (-2.0 * i / rotary_dim) / scale for i in range(rotary_dim // 2)])


def llama31_frequencies(
    rotary_dim: int, theta: float = 5e5, scale: float = 8.0, low: float = 1.0, high: float = 4.0, old_len: int = 8192
) -> np.ndarray:
    """By wave length, as the model's authors describe it: short ones stay, long ones are stretched, those between are mixed."""
    result = []
    for f in frequencies(rotary_dim, theta):
        wavelength = 2.0 * math.pi / f
        if wavelength < old_len / high:
            result.append(f)
        elif wavelength > old_len / low:
            result.append(f / scale)
        else:
            smooth = (old_len / wavelength - low) / (high - low)
            result.append((1.0 - smooth) * f / scale + smooth * f)
    return np.array(result)


def rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray, interleave: bool) -> np.ndarray:
    """x [tokens, heads, head_dim] rotated; cosine and sine [tokens, rotary_dim / 2]."""
    x = x.astype(np.float64)
    pairs = cosine.shape[-1]
    turn = (cosine + 1j * sine)[:, None, :]
    out = x.copy()
    if interleave:
        z = (x[..., 0 : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]) * turn
        out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = z.real, z.imag
    else:
        z = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * turn
        out[..., :pairs], out[..., pairs : 2 * pairs] = z.real, z.imag
    return out


def apply_rope(x: np.ndarray, positions: np.ndarray, freq: np.ndarray, interleave: bool = False) -> np.ndarray:
    """x rotated by positions * freq."""
    angle = positions.astype(np.float64)[:, None] * freq
    return rotate(x, np.cos(angle), np.sin(angle), interleave)
