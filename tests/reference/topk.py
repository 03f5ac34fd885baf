"""Top-k by sorting, one row at a time."""

from __future__ import annotations

import numpy as np


def top_k(row: np.ndarray, k: int, large: bool = False) -> np.ndarray:
    """Indices of the k largest of a float64 row (all, if there are fewer), by value, NaN first; equal ones by index, descending if `large`."""
    value = np.where(np.isnan(row), np.inf, row)
    index = np.arange(len(row))
    order = np.lexsort((-index if large else index, -value, ~np.isnan(row)))
    return order[:k]
