"""Paged KV cache upkeep, one token at a time."""

from __future__ import annotations

import numpy as np


def batch_indices_positions(append_indptr: np.ndarray, seq_lens: np.ndarray, nnz: int) -> tuple[np.ndarray, np.ndarray]:
    """(request, position) of every row; -1 for rows of no request."""
    batch_indices, positions = np.full(nnz, -1, np.int32), np.full(nnz, -1, np.int32)
    for b in range(len(seq_lens)):
        rows = range(int(append_indptr[b]), int(append_indptr[b + 1]))
        for back, row in enumerate(reversed(rows)):
            batch_indices[row], positions[row] = b, seq_lens[b] - 1 - back
    return batch_indices, positions


def append(cache: np.ndarray, source: np.ndarray, batch_indices, positions, kv_indices, kv_indptr) -> np.ndarray:
    """A copy of cache [pages, page_size, heads, dim] (NHD) with source [tokens, heads, dim] put in."""
    cache = cache.copy()
    page_size = cache.shape[1]
    for token, (b, position) in enumerate(zip(batch_indices, positions, strict=True)):
        if b >= 0 and position >= 0:
            cache[kv_indices[kv_indptr[b] + position // page_size], position % page_size] = source[token]
    return cache


class PageTable:
    """A random page table for requests of the given lengths: pages in random order, a few left over."""

    def __init__(self, rng: np.random.Generator, lengths: np.ndarray, page_size: int, spare: int = 3) -> None:
        pages = -(-lengths // page_size)
        self.kv_indptr = np.concatenate([[0], np.cumsum(pages)])
        self.num_pages = int(pages.sum()) + spare
        self.kv_indices = rng.permutation(self.num_pages)[: int(pages.sum())]
        self.last_page_len = np.where(lengths > 0, (lengths - 1) % page_size + 1, 0)
