"""Booleans into bits, one at a time."""

from __future__ import annotations

import numpy as np


def packbits(x: np.ndarray, bitorder: str) -> np.ndarray:
    """Bytes of x, the first boolean at the high ("big") or the low end."""
    out = np.zeros(-(-len(x) // 8), np.uint8)
    for i, value in enumerate(x):
        if value:
            out[i // 8] += 1 << (7 - i % 8 if bitorder == "big" else i % 8)
    return out


def segment_packbits(x: np.ndarray, indptr: np.ndarray, bitorder: str) -> tuple[np.ndarray, np.ndarray]:
    """Each segment packed alone, joined; and where each begins."""
    parts = [packbits(x[begin:end], bitorder) for begin, end in zip(indptr[:-1], indptr[1:], strict=True)]
    starts = np.cumsum([0] + [len(p) for p in parts])
    return np.concatenate([np.zeros(0, np.uint8), *parts]), starts
