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
        Then keep tokens at least min_p times as probable as the best one; 0 is off.
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

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    def thresholds(self, vocab: int) -> tuple[float, int, float, float]:
        """(temperature, top_k, top_p, min_p) as the samplers take them: greedy is top-k with k = 1."""
        return (1.0, 1, 1.0, 0.0) if self.greedy else (self.temperature, self.top_k or vocab, self.top_p, self.min_p)


class Sampler:
    """Draws one token a row.

    A token depends on its row's logits and options, the request's seed and its place in the answer, never on the batch around it.
    """

    def __init__(self, backend: NumpyBackend | TorchBackend) -> None:
        self._backend = backend

    def __call__(
        self, logits: Array, params: Sequence[SamplingParams], seeds: Sequence[int], places: Sequence[int]
    ) -> list[int]:
        """Sample from float32 logits [rows, vocab].

        Parameters
        ----------
        params
            One a row.
        seeds, places
            Per row the request's seed and how many tokens its answer has so far: Philox key and position.
        """
        rows, vocab = len(params), logits.shape[1]
        temperature, top_k, top_p, min_p = np.array([p.thresholds(vocab) for p in params], np.float64).T
        seeds, places = np.array(seeds, np.int64), np.array(places, np.int64)

        (device_temperature,) = self._backend.upload(temperature.astype(np.float32))
        probs = pyinfer.softmax(logits, device_temperature)
        tokens = np.empty(rows, np.int64)
        for chosen in (np.flatnonzero(min_p == 0), np.flatnonzero(min_p > 0)):  # usually all rows are of one kind
            if not chosen.size:
                continue
            k, p, m, seed, offset = self._backend.upload(
                top_k[chosen].astype(np.int32),
                top_p[chosen].astype(np.float32),
                min_p[chosen].astype(np.float32),
                seeds[chosen],
                places[chosen],
            )
            some = probs if chosen.size == rows else probs[chosen]
            if min_p[chosen[0]]:
                some = pyinfer.top_p_renorm_probs(pyinfer.top_k_renorm_probs(some, k), p)
                ids = pyinfer.min_p_sampling_from_probs(some, m, seed=seed, offset=offset)
            else:
                ids = pyinfer.top_k_top_p_sampling_from_probs(some, k, p, seed=seed, offset=offset)
            tokens[chosen] = self._backend.download(ids)
        return tokens.tolist()
