"""Pairwise covering arrays: few rows in which every two values that may stand together do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Allowed = Callable[[str, Any, str, Any], bool]


class Pairs:
    """Factors, their values, and which two values exclude each other.

    Parameters
    ----------
    factors
        Values by factor name.
    allowed
        allowed(factor, value, other factor, its value): whether both may stand in one row; asked with the factors in their order. All constraints are of
        this form.
    """

    def __init__(self, factors: Mapping[str, Sequence[Any]], allowed: Allowed) -> None:
        self.names = tuple(factors)
        self.values = [(f, v) for f, of_factor in factors.items() for v in of_factor]
        assert len(set(self.values)) == len(self.values), "a value is listed twice"
        ends = np.cumsum([0, *(len(x) for x in factors.values())])
        self.span = {f: slice(int(a), int(b)) for f, (a, b) in zip(self.names, itertools.pairwise(ends), strict=True)}
        self.index = {value: i for i, value in enumerate(self.values)}
        n = len(self.values)
        self.together = np.zeros((n, n), bool)  # of different factors, and not excluded
        for i, j in itertools.combinations(range(n), 2):
            if self.values[i][0] != self.values[j][0]:
                self.together[i, j] = self.together[j, i] = allowed(*self.values[i], *self.values[j])

    def row(self, chosen: Sequence[int]) -> Row:
        """Values by factor name, in the factors' order."""
        found = dict(self.values[i] for i in chosen)
        return {f: found[f] for f in self.names}

    def in_row(self, row: Row) -> list[int]:
        """The indices of a row's values."""
        return [self.index[f, row[f]] for f in self.names]

    def complete(self, start: Sequence[int], weight: np.ndarray, rng: random.Random) -> list[int] | None:
        """A whole row that holds the values `start`, at every step the value with the most `weight` [values, values] to those chosen; None if there is none."""
        free = np.ones(len(self.values), bool)
        for i in start:
            free &= self.together[i]
        gain = weight[:, list(start)].sum(1)
        have = {self.values[i][0] for i in start}
        left = [f for f in self.names if f not in have]
        rng.shuffle(left)
        return self._extend(list(start), free, gain, left, weight, rng)

    def _extend(
        self, chosen: list[int], free: np.ndarray, gain: np.ndarray, left: list[str], weight: np.ndarray, rng: random.Random
    ) -> list[int] | None:  # fmt: skip
        if not left:
            return chosen
        choices = [(int(free[self.span[f]].sum()), f) for f in left]
        if min(choices)[0] == 0:
            return None
        factor = next((f for n, f in choices if n == 1), left[0])  # what is decided already comes first
        at = self.span[factor]
        options = [i for i in range(at.start, at.stop) if free[i]]
        rng.shuffle(options)
        options.sort(key=lambda i: -gain[i])
        rest = [f for f in left if f != factor]
        for i in options:
            found = self._extend([*chosen, i], free & self.together[i], gain + weight[:, i], rest, weight, rng)
            if found is not None:
                return found
        return None


def covering_array(
    factors: Mapping[str, Sequence[Any]], allowed: Allowed = lambda *_: True, *, seed: int = 0, tries: int = 4
) -> list[Row]:
    """Rows in which every feasible pair of values of two factors occurs: greedy, and the same ones every time.

    Each row starts from a pair that is still missing and takes, factor by factor, the value that covers most missing pairs; the best of `tries` such rows is
    kept. A pair that no allowed row holds is left out.
    """
    space = Pairs(factors, allowed)
    rng = random.Random(seed)
    missing = np.triu(space.together)
    missing |= missing.T
    rows: list[Row] = []
    while missing.any():
        best: list[int] | None = None
        most = -1
        open_pairs = np.argwhere(np.triu(missing))
        for _ in range(tries):
            pair = [int(i) for i in open_pairs[rng.randrange(len(open_pairs))]]
            found = space.complete(pair, missing, rng)
            if found is None:
                missing[pair[0], pair[1]] = missing[pair[1], pair[0]] = False
                continue
            count = int(missing[np.ix_(found, found)].sum())
            if count > most:
                best, most = found, count
        if best is not None:
            missing[np.ix_(best, best)] = False
            rows.append(space.row(best))
    return rows


def missing_pairs(
    rows: Sequence[Row], factors: Mapping[str, Sequence[Any]], allowed: Allowed = lambda *_: True
) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The feasible pairs that no row holds, by exhaustive search."""
    space = Pairs(factors, allowed)
    seen = np.zeros_like(space.together)
    for row in rows:
        at = space.in_row(row)
        seen[np.ix_(at, at)] = True
    nothing, rng = np.zeros(space.together.shape, bool), random.Random(0)
    return [
        (space.values[i], space.values[j])
        for i, j in np.argwhere(np.triu(space.together & ~seen))
        if space.complete([int(i), int(j)], nothing, rng) is not None
    ]
