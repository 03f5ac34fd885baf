"""Top-k selection on the CPU: the elements, order and ties of cuda_src/topk."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.sampling import _as_bits
from pyinfer.cpu.storage import to_f32


@kernel(fastmath=False)
def _order_key(x: Any) -> Any:
    """Ascending with the value; NaN is the largest, -0 equals +0."""
    if x != x:
        return np.uint32(0xFFFFFFFF)
    bits = np.uint32(_as_bits(x + np.float32(0.0)))
    return ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)


@kernel(fastmath=False)
def top_k_rows(
    begin: Any, end: Any, memory: Any, first: Any, stride: Any, lengths: Any, k: Any, tie_large: Any, order: Any, ids: Any
) -> None:  # fmt: skip
    """ids[r, :]: the indices of row r's largest elements, ascending, or by value if `order`; -1 behind a row's length."""
    longest = np.int64(1)
    for r in range(begin, end):
        longest = max(longest, lengths[r])
    keys = np.empty(longest, np.uint32)
    items = np.empty(max(k, 1), np.uint64)
    for r in range(begin, end):
        n = lengths[r]
        take = min(k, n)
        row = first + r * stride
        for j in range(n):
            keys[j] = _order_key(to_f32(memory[row + j]))
        edge = np.uint32(0)
        need = np.int64(0)
        skip = np.int64(0)
        if 0 < take < n:
            edge = np.partition(keys[:n], n - take)[n - take]
            above = np.int64(0)
            ties = np.int64(0)
            for j in range(n):
                above += np.int64(keys[j] > edge)
                ties += np.int64(keys[j] == edge)
            need = take - above
            skip = ties - need if tie_large else np.int64(0)
        place = np.int64(0)
        seen = np.int64(0)
        if take > 0:
            for j in range(n):
                chosen = take == n or keys[j] > edge
                if not chosen and keys[j] == edge:
                    chosen = skip <= seen < skip + need
                    seen += 1
                if chosen:
                    ids[r, place] = j
                    place += 1
        if order:
            for i in range(take):
                low = np.uint64(ids[r, i]) if tie_large else np.uint64(0xFFFFFFFF) - np.uint64(ids[r, i])
                items[i] = (np.uint64(keys[ids[r, i]]) << np.uint64(32)) | low
            items[:take].sort()
            for i in range(take):
                low = items[take - 1 - i] & np.uint64(0xFFFFFFFF)
                ids[r, i] = np.int64(low if tie_large else np.uint64(0xFFFFFFFF) - low)
        for i in range(take, k):
            ids[r, i] = -1
