"""8-bit floats by their definition: all 256 values in float64, rounding by search."""

from __future__ import annotations

import functools

import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@functools.cache
def positive_values(name: str) -> np.ndarray:
    """The finite values from 0 on, by code: sign, exponent, mantissa as the formats' definition has them."""
    mantissa, bias = (3, 7) if name == "float8_e4m3fn" else (2, 15)
    values = []
    for code in range(128):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        if exponent:
            values.append((1.0 + fraction / (1 << mantissa)) * 2.0 ** (exponent - bias))
        else:
            values.append(fraction / (1 << mantissa) * 2.0 ** (1 - bias))
    return np.array([v for v in values if v <= LARGEST[name]])


def round_fp8(x: np.ndarray, name: str) -> np.ndarray:
    """x to nearest even, saturating; NaN stays."""
    table = positive_values(name)
    magnitude = np.minimum(np.abs(x), LARGEST[name])
    high = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)  # NaN: anything
    below, above = magnitude - table[high - 1], table[high] - magnitude
    up = (above < below) | ((above == below) & (high % 2 == 0))
    result = np.copysign(np.where(up, table[high], table[high - 1]), x)
    return np.where(np.isnan(x), np.nan, result)


def assert_rounded(
    got: np.ndarray, want: np.ndarray, name: str, rtol: float, atol: float = 0.0, what: str = ""
) -> None:
    """Fail unless every `got` (float64) is what some value within rtol * |want| + atol of `want` rounds to, with NaN in the same places."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert (np.isnan(got) == np.isnan(want)).all(), f"{what}: NaN at other places"
    slack = rtol * np.abs(want) + atol
    with np.errstate(invalid="ignore"):
        low, high = round_fp8(want - slack, name), round_fp8(want + slack, name)
        wrong = (got < low) | (got > high)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.size} wrong, first at {at}: got {got[at]}, expected {want[at]} rounded"
        )
