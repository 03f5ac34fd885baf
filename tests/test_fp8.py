"""Rounding to 8-bit floats is exact: every bfloat16 and float16 value, and random float32 bits, against the formats' definition."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import Backend
from tests.reference.quantization_fp8 import positive_values, round_fp8

FP8 = ["float8_e4m3fn", "float8_e5m2"]


def stored(b: Backend, x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """x as a cache of 8-bit floats keeps it: the append rounds."""
    n = -(-x.size // 64)
    rows = np.zeros((n, 1, 64), x.dtype)
    rows.reshape(-1)[: x.size] = x
    new = b.array(rows, dtype)
    cache = tuple(b.full((1, n, 1, 64), 1.0, name) for _ in range(2))
    index = b.array(np.zeros(n), "int32"), b.array(np.arange(n), "int32")
    pages = b.array([0], "int32"), b.array([0, 1], "int32"), b.array([n], "int32")
    pyinfer.append_paged_kv_cache(new, new, *index, cache, *pages)
    np.testing.assert_array_equal(b.numpy(cache[0]).view(np.uint8), b.numpy(cache[1]).view(np.uint8))
    return b.float64(cache[0]).reshape(-1)[: x.size]


def assert_exact(got: np.ndarray, x: np.ndarray, name: str) -> None:
    with np.errstate(invalid="ignore"):
        want = round_fp8(x.astype(np.float64), name)
    np.testing.assert_array_equal(got, want)
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(x[zero]))


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_value(backend_arrays: Backend, dtype: str, name: str) -> None:
    import ml_dtypes

    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert_exact(stored(backend_arrays, x, dtype, name), x.astype(np.float32), name)


@pytest.mark.parametrize("name", FP8)
def test_float32(backend_arrays: Backend, rng: np.random.Generator, name: str) -> None:
    """Any bits; values of the formats' size; what lies half way between two values, and next to it."""
    values = positive_values(name)
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (0, np.inf)]
    some = (rng.standard_normal(50_000) * np.exp2(rng.integers(-22, 18, 50_000))).astype(np.float32)
    random = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([random, some, ties, -ties, *near, *(-n for n in near), values.astype(np.float32)])
    with np.errstate(invalid="ignore"):
        assert_exact(stored(backend_arrays, x, "float32", name), x, name)
