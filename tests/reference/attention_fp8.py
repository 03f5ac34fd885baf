"""Attention of values stored in 8 bits, in float64: what is stored times what a stored 1 is worth, then the definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.reference.attention import attention


def attention_fp8(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale_q: Any = 1.0, scale_k: Any = 1.0, scale_v: Any = 1.0, **options: Any
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One request: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv], scales numbers or one a head -> out [n, Hq, Dv], base-2 lse [n, Hq]."""

    def worth(x: np.ndarray, scale: Any) -> np.ndarray:
        return np.asarray(x, np.float64) * np.asarray(scale, np.float64).reshape(1, -1, 1)

    return attention(worth(q, scale_q), worth(k, scale_k), worth(v, scale_v), **options)
