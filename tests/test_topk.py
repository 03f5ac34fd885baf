"""Top-k selection: elements, ties and order against sorting; transforms; bad input."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer.topk import TopKTieBreak
from tests.arrays import assert_same_bits
from tests.reference.topk import top_k as reference

DTYPES = ("float32", "bfloat16", "float16")


def scores(rng, rows, n):
    """Rows with ties on and off every boundary, equal values throughout, infinities, signed zeros, NaN of either sign."""
    x = rng.standard_normal((rows, n)) * rng.choice([1e-3, 1, 50], (rows, 1))
    x[0] = np.round(x[0] * 2) / 2
    x[1 % rows] = 1.5
    x[2 % rows, rng.random(n) < 0.3] = -np.inf
    x[3 % rows, rng.random(n) < 0.1] = np.inf
    x[4 % rows] = np.where(rng.random(n) < 0.5, -0.0, 0.0)
    x[5 % rows, rng.random(n) < 0.05] = np.nan
    x[5 % rows, rng.random(n) < 0.05] = -np.nan
    return x


def strided(b, values, dtype):
    wide = np.concatenate([np.full((len(values), 3), 99.0), values, np.full((len(values), 2), 99.0)], 1)
    return b.array(wide, dtype)[:, 3:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 250, 5003])
def test_elements_and_order(backend, rng, n, dtype):
    b, rows = backend, 8
    x = strided(b, scores(rng, rows, n), dtype)
    bits, values = b.numpy(x), b.float64(x)
    for k in sorted({1, min(3, n), (n + 1) // 2, max(n - 1, 1), n}):
        for tie in TopKTieBreak:
            want = np.stack([reference(values[r], k, tie == TopKTieBreak.LARGE) for r in range(rows)])
            for by_value in (False, True):
                if by_value and k > 4096 and b.framework == "cupy":
                    continue
                got_values, got = pyinfer.top_k(x, k, sorted=by_value, tie_break=tie)
                assert b.is_own(got) and b.is_own(got_values) and b.numpy(got).dtype == np.int64
                expected = want if by_value else np.sort(want, 1)
                np.testing.assert_array_equal(b.numpy(got), expected, f"k {k} {tie!r} sorted {by_value}")
                assert_same_bits(b.numpy(got_values), np.take_along_axis(bits, expected, 1))


@pytest.mark.parametrize("n", [40_000, 262_144])
def test_long_rows(backend_arrays, rng, n):
    b = backend_arrays
    x = rng.standard_normal((3, n)).astype(np.float32)
    x[1] = rng.integers(0, 50, n)
    x[2, ::3] = 7.0
    for k in (1, 2048, 4096, 5000, n - 1):
        for large in (False, True):
            want = np.stack([reference(row.astype(np.float64), k, large) for row in x])
            tie = TopKTieBreak.LARGE if large else TopKTieBreak.NONE
            got = pyinfer.top_k(b.array(x), k, sorted=True, tie_break=tie)[1]
            np.testing.assert_array_equal(b.numpy(got), want)
            got = pyinfer.top_k(b.array(x), k, tie_break=tie)[1]
            np.testing.assert_array_equal(b.numpy(got), np.sort(want, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transforms(backend, rng, dtype):
    b, rows, n, k = backend, 9, 600, 64
    values = rng.standard_normal((rows, n))
    lengths = np.array([0, 1, k - 1, k, k + 1, n, n + 5, -3, 300])
    # What lies behind a row's length does not count, however large.
    for r, length in enumerate(lengths):
        values[r, max(min(length, n), 0) :] = 1e6
    x = b.array(values, dtype)
    rounded = b.float64(x)
    table, offsets = rng.integers(0, 10**6, (5, n + 3)), rng.integers(0, 10**6, rows)
    batch = rng.integers(0, 5, rows)
    ints = {
        name: b.array(v, "int32")
        for name, v in dict(lengths=lengths, table=table, offsets=offsets, batch=batch).items()
    }
    for tie in (TopKTieBreak.SMALL, TopKTieBreak.LARGE):
        pages = pyinfer.top_k_page_table_transform(x, ints["table"], ints["lengths"], k, ints["batch"], tie_break=tie)
        ragged = pyinfer.top_k_ragged_transform(x, ints["offsets"], ints["lengths"], k, tie_break=tie)
        for r in range(rows):
            length = max(min(int(lengths[r]), n), 0)
            index = np.sort(reference(rounded[r, :length], k, tie == TopKTieBreak.LARGE))
            rest = [-1] * (k - len(index))
            assert b.numpy(pages)[r].tolist() == [*table[batch[r], index], *rest]
            assert b.numpy(ragged)[r].tolist() == [*(index + offsets[r]), *rest]
    own = b.array(rng.integers(0, 99, (rows, n)), "int32")
    pages = pyinfer.top_k_page_table_transform(x, own, ints["lengths"], k)
    line = np.sort(reference(rounded[5], k))
    assert b.numpy(pages)[5].tolist() == b.numpy(own)[5, line].tolist()


@pytest.mark.parametrize(("next_n", "ratio"), [(1, 1), (3, 1), (2, 4)])
def test_varlen(backend, rng, next_n, ratio):
    b, requests, n, k = backend, 5, 300, 16
    values = rng.standard_normal((requests * next_n, n)).astype(np.float32)
    seq_lens = np.array([0, 5, 40 * ratio, n * ratio, n * ratio + 9])
    x, lengths = b.array(values), b.array(seq_lens, "int32")
    index, got = pyinfer.top_k_varlen(x, lengths, k, compress_ratio=ratio, next_n=next_n, return_values=True)
    only, none = pyinfer.top_k_varlen(x, lengths, k, compress_ratio=ratio, next_n=next_n, backend="radix")
    assert none is None
    assert_same_bits(b.numpy(only), b.numpy(index))
    for r in range(requests * next_n):
        length = min(max(int(seq_lens[r // next_n]) - next_n + r % next_n + 1, 0) // ratio, n)
        want = np.sort(reference(values[r, :length].astype(np.float64), k))
        assert b.numpy(index)[r].tolist() == [*want, *[-1] * (k - len(want))]
        assert b.numpy(got)[r].tolist() == [*values[r, want], *[-np.inf] * (k - len(want))]
    outs = b.full((requests * next_n, k), 0, "int32"), b.full((requests * next_n, k), np.nan, "float32")
    same = pyinfer.top_k_varlen(
        x, lengths, k, compress_ratio=ratio, next_n=next_n, return_values=True, out_indices=outs[0], out_values=outs[1]
    )
    assert same[0] is outs[0] and same[1] is outs[1]
    assert_same_bits(b.numpy(outs[0]), b.numpy(index))
    assert_same_bits(b.numpy(outs[1]), b.numpy(got))


def test_no_rows(backend):
    x, none = backend.full((0, 9), 0, "float16"), backend.full((0,), 0, "int32")
    values, index = pyinfer.top_k(x, 4, sorted=True)
    assert tuple(values.shape) == tuple(index.shape) == (0, 4)
    assert tuple(pyinfer.top_k_ragged_transform(x, none, none, 4).shape) == (0, 4)
    assert tuple(pyinfer.top_k_varlen(x, none, 4)[0].shape) == (0, 4)


@pytest.mark.cpu
def test_results_do_not_depend_on_threads(rng):
    from pyinfer.cpu import threads

    x = np.round(rng.standard_normal((50, 900)) * 4).astype(np.float32)
    before = threads.get_num_threads()
    try:
        threads.set_num_threads(1)
        one = pyinfer.top_k(x, 100, sorted=True)
        threads.set_num_threads(4)
        for a, b in zip(pyinfer.top_k(x, 100, sorted=True), one, strict=True):
            assert_same_bits(a, b)
    finally:
        threads.set_num_threads(before)


def test_bad_arguments(backend):
    b = backend
    x, ints = b.full((3, 10), 1, "float32"), b.full((3,), 2, "int32")
    table = b.full((3, 10), 0, "int32")
    for error, text, call in (
        (TypeError, "input has the wrong dtype: got int32", lambda: pyinfer.top_k(table, 2)),
        (ValueError, "input has the wrong number of axes", lambda: pyinfer.top_k(x[0], 2)),
        (ValueError, "input has rows of an unsupported length: got 0", lambda: pyinfer.top_k(x[:, :0], 1)),
        (ValueError, "k is out of range: got 0, wanted 1 to 10", lambda: pyinfer.top_k(x, 0)),
        (ValueError, "k is out of range: got 11, wanted 1 to 10", lambda: pyinfer.top_k(x, 11)),
        (ValueError, "k is out of range: got 0, wanted 1 or more", lambda: pyinfer.top_k_ragged_transform(x, ints, ints, 0)),
        (ValueError, "tie_break is unknown: got 7, wanted TopKTieBreak.NONE, SMALL or LARGE", lambda: pyinfer.top_k(x, 1, tie_break=7)),
        (TypeError, "lengths has the wrong dtype", lambda: pyinfer.top_k_ragged_transform(x, ints, b.full((3,), 1, "int64"), 1)),
        (ValueError, "offsets has the wrong shape", lambda: pyinfer.top_k_ragged_transform(x, ints[:2], ints, 1)),
        (ValueError, "src_page_table is too narrow: got 9, wanted 10 columns or more", lambda: pyinfer.top_k_page_table_transform(x, table[:, :9], ints, 1)),
        (ValueError, "src_page_table has too few lines: got 2, wanted 3 or more (input's rows). Pass row_to_batch.",
         lambda: pyinfer.top_k_page_table_transform(x, table[:2], ints, 1)),
        (ValueError, "backend is not available: got 'gvr', wanted 'auto' or 'radix'", lambda: pyinfer.top_k_varlen(x, ints, 1, backend="gvr")),
        (ValueError, "next_n does not divide the rows: got 2, wanted a divisor of 3", lambda: pyinfer.top_k_varlen(x, ints, 1, next_n=2)),
        (ValueError, "compress_ratio is out of range: got 0", lambda: pyinfer.top_k_varlen(x, ints, 1, compress_ratio=0)),
        (ValueError, "out_indices is not contiguous", lambda: pyinfer.top_k_varlen(x, ints, 5, out_indices=table[:, ::2])),
    ):  # fmt: skip
        with pytest.raises(error) as info:
            call()
        assert text in str(info.value)
    if b.device == "cpu":
        with pytest.raises(
            ValueError, match="row_to_batch names no line of the page table: got values from 0 to 5, wanted 0 to 2"
        ):
            pyinfer.top_k_page_table_transform(x, table, ints, 1, b.array([0, 5, 1], "int32"))
    if b.framework == "cupy":
        with pytest.raises(
            ValueError, match="k is too large to be sorted outside of torch: got 5000, wanted 4096 or less"
        ):
            pyinfer.top_k(b.full((1, 6000), 0, "float32"), 5000, sorted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_cpu(backend_arrays, rng, dtype):
    for n in (9, 1023, 32_000, 128_257):
        x = strided(backend_arrays, scores(rng, 6, n), dtype)
        for k in (1, min(n, 500), n // 2):
            for by_value in (False, True):
                there, here = pyinfer.top_k(x, k, by_value), pyinfer.top_k(x.cpu(), k, by_value)
                for a, c in zip(there, here, strict=True):
                    assert_same_bits(backend_arrays.numpy(a), backend_arrays.numpy(c))


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
def test_kernels_compile_without_spills(arch):
    from pyinfer.jit.topk import gen_top_k, gen_topk_module

    for spec in (gen_top_k("bfloat16", True, True), gen_top_k("float32")):
        resources = spec.build(arch).resources
        assert resources.spill_stores == resources.spill_loads == resources.stack == 0, f"{spec}: {resources}"
        assert resources.registers <= 64 and resources.smem <= 48 * 1024
    names = [spec.name for spec in gen_topk_module().specs]
    assert len(set(names)) == len(names) == 9
