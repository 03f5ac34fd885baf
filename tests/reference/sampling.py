"""Sampling by the definitions, in float64 and in exact integers, one row at a time.

`kept` and `draw` follow pyinfer.sampling's module text word by word: Python integers of any size, sorting, and no thresholds.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def softmax(logits: np.ndarray, temperature: np.ndarray | float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) by rows in float64. Temperature 0: uniform over what is not -inf; rows of -inf are 0, rows with NaN are NaN."""
    x = np.asarray(logits, np.float64)
    t = np.broadcast_to(np.asarray(temperature, np.float64).reshape(-1, 1), (x.shape[0], 1))
    out = np.zeros_like(x)
    for row, (values, temp) in enumerate(zip(x, t[:, 0], strict=True)):
        if np.isnan(values).any():
            out[row] = np.nan
            continue
        top = values.max()
        if top == -np.inf:
            continue
        if top == np.inf:
            weights = (values == np.inf).astype(np.float64)
        elif temp == 0:
            weights = (values > -np.inf).astype(np.float64)
        else:
            weights = np.exp((values - top) / temp)
        out[row] = weights / weights.sum()
    return out


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def uniform64(seed: int, offset: int, word: int = 0) -> int:
    """The 64 bits that a draw uses."""
    seed, offset = seed % 2**64, offset % 2**64
    x = philox((offset % 2**32, offset >> 32, word, 0), (seed % 2**32, seed >> 32))
    return x[0] + (x[1] << 32)


def unit_exponent(p: np.ndarray) -> int:
    """s: masses count in units of 2^-s."""
    top = float(p.max())
    exponent = max(math.frexp(top)[1] - 1, -126)
    return 44 if -19 <= exponent <= 0 else 44 - exponent


def masses(p: np.ndarray) -> list[int]:
    """ceil(p * 2^s) as Python integers."""
    s = unit_exponent(p)
    unit = Fraction(2) ** s
    return [math.ceil(Fraction(float(v)) * unit) for v in p]


def accepted(p: np.ndarray, m: list[int], top_k: int, limit: Fraction | float) -> np.ndarray:
    """Which x satisfy count(p > p_x) < top_k and mass(p > p_x) < limit, p_x > 0."""
    order = np.argsort(-p, kind="stable")
    keep = np.zeros(p.shape[0], bool)
    above = mass_above = 0
    i = 0
    while i < len(order):
        j = i
        while j < len(order) and p[order[j]] == p[order[i]]:
            j += 1
        if p[order[i]] > 0 and above < top_k and mass_above < limit:
            keep[order[i:j]] = True
        above += j - i
        mass_above += sum(m[t] for t in order[i:j])
        i = j
    return keep


def kept(
    p: np.ndarray, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0, joint: bool = False
) -> np.ndarray:
    """The tokens that a filter keeps, of one row of float32 probabilities."""
    p = np.asarray(p, np.float32)
    m = masses(p)
    top_p = Fraction(float(np.float32(top_p)))
    k = p.shape[0] if top_k is None else top_k
    units = max(top_p * Fraction(2) ** unit_exponent(p), Fraction(1)) if top_p < 1 else math.inf
    if joint or top_k is None:
        keep = accepted(p, m, k, units)
    else:
        keep = accepted(p, m, k, math.inf)
        if top_p < 1:
            total = sum(v for v, good in zip(m, keep, strict=True) if good)
            keep &= accepted(np.where(keep, p, 0), m, p.shape[0], max(top_p * total, Fraction(1)))
    return keep & (p >= np.float32(min_p) * p.max())


def draw(p: np.ndarray, keep: np.ndarray, uniform: int) -> int:
    """The first kept id whose cumulative mass exceeds uniform / 2^64 of the kept mass."""
    m = [v if good else 0 for v, good in zip(masses(np.asarray(p, np.float32)), keep, strict=True)]
    target = (uniform * sum(m)) >> 64
    for i, cumulative in enumerate(np.cumsum(np.array(m, dtype=object))):
        if cumulative > target:
            return i
    raise AssertionError("nothing kept")


def renorm(p: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The kept values divided by their sum."""
    values = np.where(keep, np.asarray(p, np.float64), 0.0)
    return values / values.sum()


def chi_square_sigmas(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations Pearson's statistic lies above its mean (Wilson and Hilferty's normal approximation).

    Cells with an expectation below 10 are pooled. 5 sigmas are passed by chance once in 3.5 million.
    """
    observed, expected = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    pooled = int(np.searchsorted(expected, 10.0))
    if pooled:
        observed = np.concatenate([[observed[:pooled].sum()], observed[pooled:]])
        expected = np.concatenate([[expected[:pooled].sum()], expected[pooled:]])
        if expected[0] < 10.0 and len(expected) > 1:
            observed[1] += observed[0]
            expected[1] += expected[0]
            observed, expected = observed[1:], expected[1:]
    freedom = len(expected) - 1
    if freedom < 1:
        return 0.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2.0 / (9.0 * freedom)
    return ((statistic / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
