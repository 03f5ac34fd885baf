"""Packing booleans against a loop, on either device."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.reference import quantization as reference

ORDERS = ("big", "little")
# around the vector kernel's 32 booleans a thread and the block's 256 threads
COUNTS = (0, 1, 7, 8, 9, 31, 32, 33, 64, 100, 255, 256, 1000, 8191, 8192, 8193, 20011)


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.random(n) < rng.choice([0.05, 0.5, 0.95])


@pytest.mark.parametrize("order", ORDERS)
def test_packbits(rng, backend, order):
    for n in COUNTS:
        x = draw(rng, n)
        got = pyinfer.packbits(backend.array(x), order)
        assert backend.is_own(got)
        want = reference.packbits(x, order)
        np.testing.assert_array_equal(backend.numpy(got), want)
        np.testing.assert_array_equal(want, np.packbits(x, bitorder=order))
    assert (backend.numpy(pyinfer.packbits(backend.array(x))) == np.packbits(x)).all(), "big is the default"


@pytest.mark.parametrize("order", ORDERS)
def test_bytes_count_as_booleans(rng, backend, order):
    """uint8 with any value but 0, among them 128, whose low bits are all 0."""
    x = rng.choice(np.array([0, 1, 2, 127, 128, 255], np.uint8), 4099)
    want = reference.packbits(x != 0, order)
    np.testing.assert_array_equal(backend.numpy(pyinfer.packbits(backend.array(x), order)), want)


@pytest.mark.parametrize("order", ORDERS)
def test_strides_and_addresses(rng, backend, order):
    x = draw(rng, 3000)
    tensor = backend.array(x)
    for part in (slice(None, None, 3), slice(1, None), slice(5, 2000), slice(2, None, 2), slice(16, 17)):
        np.testing.assert_array_equal(
            backend.numpy(pyinfer.packbits(tensor[part], order)), reference.packbits(x[part], order)
        )
        n = len(x[part])
        indptr = np.array([0, n // 3, n])
        got, _ = pyinfer.segment_packbits(tensor[part], indptr, order)
        np.testing.assert_array_equal(backend.numpy(got), reference.segment_packbits(x[part], indptr, order)[0])


@pytest.mark.parametrize("where", ["host", "list", "int32", "int64"])
@pytest.mark.parametrize("order", ORDERS)
def test_segment_packbits(rng, backend, order, where):
    for lengths in ([], [0], [5], [8, 8], [3, 0, 0, 17, 1, 0], [0, 0], rng.integers(0, 70, 200), [5000, 0, 3001]):
        for start in (0, 3):  # a first segment need not begin at 0, nor the last end with x
            indptr = start + np.concatenate([[0], np.cumsum(np.asarray(lengths, int))])
            x = draw(rng, indptr[-1] + start)
            if where == "host":
                given = indptr
            elif where == "list":
                given = indptr.tolist()
            else:
                given = backend.array(indptr, where)
            packed, new_indptr = pyinfer.segment_packbits(backend.array(x), given, order)
            want, starts = reference.segment_packbits(x, indptr, order)
            assert backend.is_own(packed)
            assert backend.is_own(new_indptr)
            assert backend.numpy(new_indptr).dtype == np.int32
            np.testing.assert_array_equal(backend.numpy(new_indptr), starts)
            np.testing.assert_array_equal(backend.numpy(packed), want)


@pytest.mark.gpu
def test_host_indptr_does_not_synchronise(rng, backend_arrays):
    import torch

    x = backend_arrays.array(draw(rng, 100))
    pyinfer.segment_packbits(x, np.array([0, 50, 100]))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed, _ = pyinfer.segment_packbits(x, np.array([0, 30, 100]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference.segment_packbits(backend_arrays.numpy(x), np.array([0, 30, 100]), "big")[0]
    np.testing.assert_array_equal(backend_arrays.numpy(packed), want)


def test_errors(backend_arrays):
    x = backend_arrays.array(np.ones(10, bool))
    with pytest.raises(ValueError, match="packbits: bitorder is no bit order: got 'middle', wanted 'big' or 'little'"):
        pyinfer.packbits(x, "middle")
    with pytest.raises(TypeError, match=r"packbits: x .*float32.*bool or uint8"):
        pyinfer.packbits(backend_arrays.array(np.ones(3, np.float32)))
    with pytest.raises(ValueError, match=r"packbits: x has the wrong number of axes: got 2"):
        pyinfer.packbits(x.reshape(2, 5))
    for indptr, text in (
        ([], "indptr is empty: got 0 entries"),
        ([-1, 3], "indptr starts below 0: got -1"),
        ([0, 5, 3], "indptr decreases: got 3 at entry 2 after 5"),
        ([0, 11], r"indptr reaches beyond x: got 11, wanted at most 10 \(x has so many\)"),
    ):
        with pytest.raises(ValueError, match="segment_packbits: " + text):
            pyinfer.segment_packbits(x, indptr)
    with pytest.raises(TypeError, match="segment_packbits: indptr holds no integers"):
        pyinfer.segment_packbits(x, np.array([0.0, 3.0]))
