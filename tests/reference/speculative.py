"""chain_speculative_sampling in exact arithmetic, one request at a time."""

from __future__ import annotations

import numpy as np

from tests.reference import sampling as ref


def chain(
    draft: np.ndarray, ids: np.ndarray, target: np.ndarray, seed: int, offset: int, word: int = 0
) -> tuple[list[int], int, int]:
    """(ids, accepted, emitted) of draft [n, vocab], ids [n], target [n + 1, vocab], all float32 values."""
    n, vocab = draft.shape
    passes = []
    for i in range(n):
        u = np.float32(((ref.uniform64(seed, offset, word + i) >> 40) + 1) / 2**24)
        token = int(ids[i])
        passes.append(bool(0 <= token < vocab and np.float32(u * draft[i, token]) < target[i, token]))
    prefix = passes.index(False) if False in passes else n
    rest = target[prefix]
    if prefix < n:
        difference = np.maximum(target[prefix] - draft[prefix], np.float32(0))
        rest = difference if difference.any() else rest
    last = ref.draw(rest, rest > 0, ref.uniform64(seed, offset, word + n))
    return [*(int(t) for t in ids[:prefix]), last, *[-1] * (n - prefix)], sum(passes), prefix
