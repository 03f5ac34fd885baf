"""Choosing the next tokens: one softmax and one or two pyinfer sampling calls for the whole batch, whatever each request asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

import pyinfer

from .backend import Array, NumpyBackend, TorchBackend


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.

    Parameters
    ----------
    max_new_tokens : int
        Longest answer.
    temperature : float
        0 is greedy: the most probable token, always.
    top_k : int
        Keep the k most probable tokens; 0 keeps all.
    top_p : float
        Then keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    min_p : float
        Keep tokens at least min_p times as probable as the best; 0 is off. Used instead of top_k and top_p, not with them.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        )
        for name, good, wanted in checks:
            if not good:
                raise ValueError(f"{name} is out of range: got {getattr(self, name)}, wanted {wanted}")
        if self.min_p and (self.top_k or self.top_p < 1):
            raise ValueError("min_p is used instead of top_k and top_p: give one or the other")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


class Sampler:
    """Draws one token a row; equal seeds and equal batches give equal tokens."""

    def __init__(self, backend: NumpyBackend | TorchBackend, seed: int) -> None:
        self._backend = backend
        self._generator = backend.generator(seed)

    def __call__(self, logits: Array, params: Sequence[SamplingParams]) -> list[int]:
        """Sample from float32 logits [rows, vocab], one `SamplingParams` a row."""
        put = self._backend.upload_float
        temperature = put(np.array([1.0 if p.greedy else p.temperature for p in params], np.float32))
        probs = pyinfer.softmax(logits, temperature)
        tokens = np.empty(len(params), np.int64)
        by_min_p = np.array([p.min_p > 0 and not p.greedy for p in params])
        for rows in (np.flatnonzero(~by_min_p), np.flatnonzero(by_min_p)):
            if not rows.size:
                continue
            chosen, picked = [params[i] for i in rows], probs if rows.size == len(params) else probs[rows]
            if by_min_p[rows[0]]:
                min_p = put(np.array([p.min_p for p in chosen], np.float32))
                ids = pyinfer.min_p_sampling_from_probs(picked, min_p, generator=self._generator)
            else:  # greedy rows are top-k with k = 1
                vocab = logits.shape[1]
                (top_k,) = self._backend.upload(
                    np.array([1 if p.greedy else p.top_k or vocab for p in chosen], np.int32)
                )
                top_p = put(np.array([1.0 if p.greedy else p.top_p for p in chosen], np.float32))
                ids = pyinfer.top_k_top_p_sampling_from_probs(picked, top_k, top_p, generator=self._generator)
            tokens[rows] = self._backend.download(ids)
        return tokens.tolist()
