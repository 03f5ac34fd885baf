"""Gated activations in float64."""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """x (1 + erf(x / sqrt 2)) / 2; by erfc where 1 + erf would cancel."""
    return 0.5 * x * np.where(x > 0, 1.0 + _erf(x / math.sqrt(2.0)), _erfc(-x / math.sqrt(2.0)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def act_and_mul(name: str, x: np.ndarray) -> np.ndarray:
    """act(first half) * second half of the last axis."""
    x = x.astype(np.float64)
    width = x.shape[-1] // 2
    return ACTIVATIONS[name](x[..., :width]) * x[..., width:]
