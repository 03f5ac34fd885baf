"""Append with rounding to 8 bits, gather, and copies of whole pages."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests import stub_driver
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits, with_fp8
from tests.reference import page as reference
from tests.reference.quantization_fp8 import assert_rounded, round_fp8
from tests.test_page import bits

FP8 = ["float8_e4m3fn", "float8_e5m2"]


class Places:
    """Tokens of three requests scattered over pages; one token has no place."""

    def __init__(self, b: Backend, rng: np.random.Generator, page_size: int, tokens: int = 9) -> None:
        lengths = np.array([3 * page_size, 1, 2 * page_size + 1])
        self.table = reference.PageTable(rng, lengths, page_size)
        self.batch_indices = rng.choice([0, 2], tokens)
        self.positions = rng.permutation(2 * page_size + 1)[:tokens]
        self.batch_indices[4] = -1
        self.index = [b.array(x, rng.choice(["int32", "int64"])) for x in (self.batch_indices, self.positions)]
        t = self.table
        self.pages = [b.array(x, rng.choice(["int32", "int64"])) for x in (t.kv_indices, t.kv_indptr)]
        self.last = b.array(t.last_page_len, "int32")

    def append(self, cache: np.ndarray, source: np.ndarray) -> np.ndarray:
        t = self.table
        return reference.append(cache, source, self.batch_indices, self.positions, t.kv_indices, t.kv_indptr)

    def read(self, cache: np.ndarray) -> np.ndarray:
        """Row by row what lies at each token's place; zeros without one."""
        t, page_size = self.table, cache.shape[1]
        rows = []
        for request, position in zip(self.batch_indices, self.positions, strict=True):
            if request < 0:
                rows.append(np.zeros(cache.shape[2:], cache.dtype))
            else:
                rows.append(cache[t.kv_indices[t.kv_indptr[request] + position // page_size], position % page_size])
        return np.stack(rows)


def ordered(x: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(x if layout == "NHD" else x.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (5, 3)], ids=str)
def test_append_rounds(backend_arrays: Backend, rng: np.random.Generator, layout: str, dims) -> None:
    """stored = round(value / scale): a number, one scale in a tensor, one a head; and 1 if there is none."""
    b, page_size, heads = backend_arrays, 8, 3
    for dtype, name in (("bfloat16", FP8[0]), ("float16", FP8[1]), ("float32", FP8[0])):
        places = Places(b, rng, page_size)
        new = [b.array(rng.standard_normal((9, heads, d)) * 30, dtype) for d in dims]
        by_head = rng.uniform(0.05, 0.5, (2, heads)).astype(np.float32)
        for scales in (None, (0.25, 0.5), (b.array(by_head[0, :1]), 0.125), (b.array(by_head[0]), b.array(by_head[1]))):
            before = [np.full((places.table.num_pages, page_size, heads, d), 7.0) for d in dims]
            caches = tuple(b.array(ordered(x, layout), name) for x in before)
            k_scale, v_scale = scales or (None, None)
            pyinfer.append_paged_kv_cache(
                *new, *places.index, caches, *places.pages, places.last, layout, k_scale, v_scale
            )
            values = [
                1.0 if s is None else b.float64(s).reshape(-1, 1) if not isinstance(s, float) else s
                for s in (k_scale, v_scale)
            ]
            for cache, old, source, scale in zip(caches, before, new, values, strict=True):
                got = b.float64(cache) if layout == "NHD" else b.float64(cache).transpose(0, 2, 1, 3)
                assert_rounded(got, places.append(old, b.float64(source) / scale), name, 1e-6)


def test_append_latent_rounds(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b, page_size = backend_arrays, 16
    places = Places(b, rng, page_size)
    new = [b.array(rng.standard_normal((9, d)) * 30, "bfloat16") for d in (512, 64)]
    before = [np.full((places.table.num_pages, page_size, d), 7.0) for d in (512, 64)]
    caches = tuple(b.array(x, FP8[0]) for x in before)
    pyinfer.append_paged_mla_kv_cache(
        *new, *places.index, *caches, *places.pages, places.last, 0.125, b.array(np.array([0.5]), "float32")
    )
    for cache, old, source, scale in zip(caches, before, new, (0.125, 0.5), strict=True):
        want = places.append(old[:, :, None], b.float64(source)[:, None] / scale)
        assert_rounded(b.float64(cache)[:, :, None], want, FP8[0], 1e-6)


def test_append_saturates(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    new = b.array(np.array([[[1e6, -1e6, np.nan, np.inf, 0.0, 3.0, 2**-20, -np.inf]]]), "float32")
    for name, largest in zip(FP8, (448.0, 57344.0), strict=True):
        caches = tuple(b.full((1, 1, 1, 8), 1.0, name) for _ in range(2))
        zero, pages = b.array([0], "int32"), (b.array([0], "int32"), b.array([0, 1], "int32"), b.array([1], "int32"))
        pyinfer.append_paged_kv_cache(new, new, zero, zero, caches, *pages)
        want = [largest, -largest, np.nan, largest, 0.0, 3.0, round_fp8(np.array(2.0**-20), name), -largest]
        for cache in caches:
            np.testing.assert_array_equal(b.float64(cache).reshape(-1), want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (24, 8), (5, 3)], ids=str)
def test_gather(backend: Backend, rng: np.random.Generator, layout: str, dims) -> None:
    b, page_size, heads = backend, 4, 2
    for dtype in ("float16", "bfloat16", "float32"):
        places = Places(b, rng, page_size)
        stored = [bits(rng, (places.table.num_pages, page_size, heads, d), dtype) for d in dims]
        caches = tuple(b.array(ordered(x, layout)) for x in stored)
        got = pyinfer.gather_paged_kv_cache(*places.index, caches, *places.pages, layout)
        assert b.is_own(got[0])
        out = tuple(b.array(np.zeros((9, heads, d + 3)), dtype)[..., 1:-2] for d in dims)
        same = pyinfer.gather_paged_kv_cache(*places.index, caches, *places.pages, layout, *out)
        for x, y, o, s in zip(got, same, out, stored, strict=True):
            assert y is o
            assert_same_bits(b.numpy(x), places.read(s))
            assert_same_bits(b.numpy(y), places.read(s))


def test_gather_converts(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """8-bit floats come back times their scales, one for all heads or one a head."""
    b, page_size, heads = backend_arrays, 8, 3
    for dtype, name in (("bfloat16", FP8[0]), ("float16", FP8[1]), ("float32", FP8[0])):
        places = Places(b, rng, page_size)
        stored = [rng.standard_normal((places.table.num_pages, page_size, heads, d)) * 20 for d in (64, 24)]
        both = tuple(b.array(x, name) for x in stored)
        by_head = rng.uniform(0.05, 0.5, heads).astype(np.float32)
        got = pyinfer.gather_paged_kv_cache(
            *places.index, both, *places.pages, k_scale=0.25, v_scale=b.array(by_head), dtype=dtype
        )
        for x, cache, scale in zip(got, both, (0.25, by_head.astype(np.float64)[:, None]), strict=True):
            assert_close(b.float64(x), places.read(b.float64(cache)) * scale, rtol=1.01 * EPSILON[dtype])
    ckv, kpe = (b.array(rng.standard_normal((places.table.num_pages, page_size, d)), FP8[0]) for d in (512, 64))
    got = pyinfer.gather_paged_mla_kv_cache(*places.index, ckv, kpe, *places.pages, dtype="bfloat16")
    for x, cache in zip(got, (ckv, kpe), strict=True):
        assert_close(b.float64(x)[:, None], places.read(b.float64(cache)[:, :, None]), rtol=0)


def test_gather_is_the_reverse_of_append(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """Every token of every request, in order."""
    b, page_size = backend_arrays, 4
    lengths = np.array([5, 0, 9])
    table = reference.PageTable(rng, lengths, page_size)
    indptr, total = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum())
    index = pyinfer.get_batch_indices_positions(b.array(indptr, "int32"), b.array(lengths, "int32"), total)
    pages = (b.array(table.kv_indices, "int32"), b.array(table.kv_indptr, "int32"))
    cache = b.full((table.num_pages, 2, page_size, 2, 64), 0.0, "float16")
    key, value = (b.array(rng.standard_normal((total, 2, 64)), "float16") for _ in range(2))
    pyinfer.append_paged_kv_cache(key, value, *index, cache, *pages, b.array(table.last_page_len, "int32"))
    got = pyinfer.gather_paged_kv_cache(*index, cache, *pages)
    assert_same_bits(b.numpy(got[0]), b.numpy(key))
    assert_same_bits(b.numpy(got[1]), b.numpy(value))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "float32", "int64"])
def test_copy_pages(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Dense pages, pages of strided rows, odd sizes; within a cache and between two."""
    b = with_fp8(backend) if dtype.startswith("float8") else backend
    for shape in ((7, 4, 2, 64), (6, 3, 5), (9, 2, 8, 2, 16), (5,)):
        values = rng.integers(0, 100, shape)
        pages = shape[0]
        order = rng.permutation(pages)
        source, target = order[:2], order[2:4]
        index = [b.array(x, rng.choice(["int32", "int64"])) for x in (source, target)]
        cache = b.array(values, dtype)
        before = b.numpy(cache).copy()
        want = before.copy()
        want[target] = before[source]
        pyinfer.copy_pages(cache, *index)
        assert_same_bits(b.numpy(cache), want, "within")
        # Between: into the middle of a wider tensor, from a strided one; the page numbers may be the same here.
        wide = b.array(
            np.zeros((pages + 2, *shape[1:-1], shape[-1] + 3)) if len(shape) > 1 else np.zeros(pages + 2), dtype
        )
        out = wide[..., 1:-2] if len(shape) > 1 else wide
        pyinfer.copy_pages((b.array(before), b.array(before)), index[0], index[0], (out, b.array(before)))
        expected = np.zeros(out.shape, before.dtype)
        expected[source] = before[source]
        assert_same_bits(b.numpy(out), expected, "between")


def test_copy_pages_of_a_cache_in_two_layouts(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """A page of HND order into one of NHD order: what lies where is the same element."""
    b = backend_arrays
    values = rng.standard_normal((4, 3, 8, 64))
    source, target = b.array(values, "float16"), b.full((4, 8, 3, 64), 0.0, "float16")
    seen = target.transpose(1, 2)
    pyinfer.copy_pages(source, b.array([1, 3], "int32"), b.array([0, 2], "int32"), seen)
    want = np.zeros((4, 3, 8, 64), np.float16)
    want[[0, 2]] = values.astype(np.float16)[[1, 3]]
    assert_same_bits(b.numpy(seen), want)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "shape,source_order,target_order,pad",
    [
        ((3, 8, 64), (0, 1, 2), (0, 1, 2), 0),
        ((3, 8, 64), (0, 1, 2), (1, 0, 2), 0),
        ((3, 8, 64), (1, 0, 2), (0, 1, 2), 0),
        ((3, 8, 64), (1, 0, 2), (1, 0, 2), 0),
        ((2, 3, 5), (0, 1, 2), (0, 1, 2), 3),
        ((4, 1, 6), (0, 1, 2), (2, 1, 0), 0),
        ((7,), (0,), (0,), 1),
        ((), (), (), 0),
    ],
    ids=str,
)
def test_copy_pages_launch(monkeypatch, rng: np.random.Generator, shape, source_order, target_order, pad: int) -> None:
    """What the kernel is told, read as it reads it: every byte of a page goes where the same element of the other layout lies."""
    torch = pytest.importorskip("torch")
    from pyinfer import _page_moves
    from pyinfer.jit.page import COPY_BLOCK, COPY_PAGES, COPY_UNROLL

    def laid_out(order, pad, fill):
        """[pages, *shape] whose axes lie in memory in that order, the last one followed by `pad` unused elements."""
        memory = [shape[i] for i in order]
        store = torch.full((5, *memory[:-1], memory[-1] + pad) if memory else (5,), fill, dtype=torch.int16)
        inside = store[..., : memory[-1]] if memory else store
        return inside.permute(0, *(1 + order.index(i) for i in range(len(order))))

    _page_moves._copy_kernel.cache_clear()
    launches = stub_driver.install(monkeypatch)
    source = laid_out(source_order, pad, 0)
    target = laid_out(target_order, 0, -1)
    source.copy_(torch.from_numpy(rng.integers(0, 30000, (5, *shape)).astype(np.int16)))
    pairs = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([1, 3, 9], dtype=torch.int64)
    pyinfer.copy_pages(source, *pairs, target)
    ((name, (grid, *_), data, *_),) = launches
    _page_moves._copy_kernel.cache_clear()
    p = stub_driver.fields(COPY_PAGES, data)
    size = int(name.rpartition("_v")[2])
    import ctypes

    for pair in range(3):
        first, second = int(pairs[0][pair]), int(pairs[1][pair])
        if not (0 <= first < p["num_source_pages"] and 0 <= second < p["num_target_pages"]):
            continue
        for i in range(p["parts"] * COPY_BLOCK * COPY_UNROLL):
            row, c = divmod(i, p["chunks"])
            if row < p["rows"]:
                major, minor = divmod(row, p["inner"])
                at = [
                    p[t] + page * p[f"{t}_stride_page"] + major * p[f"{t}_outer"] + minor * p[f"{t}_inner"] + c * size
                    for t, page in (("source", first), ("target", second))
                ]
                assert not (at[0] | at[1]) % size
                ctypes.memmove(at[1], at[0], size)
    assert grid == 3 * p["parts"] and p["wide"] == 2
    want = torch.full_like(target, -1)
    want[[1, 3]] = source[[4, 0]]
    assert torch.equal(target, want)


def test_nothing_to_do(backend: Backend) -> None:
    b = backend
    none, cache = b.array(np.zeros(0), "int32"), b.full((3, 4, 2, 8), 1.0, "float16")
    pyinfer.copy_pages(cache, none, none)
    got = pyinfer.gather_paged_kv_cache(none, none, (cache, cache), b.array([0], "int32"), b.array([0, 1], "int32"))
    assert tuple(got[0].shape) == (0, 2, 8)
    assert (b.float64(cache) == 1).all()


def test_pages_that_do_not_exist(backend_arrays: Backend) -> None:
    """The CPU refuses and writes nothing; a GPU leaves such pairs out."""
    b = backend_arrays
    for source, target, word in (([0, 3], [1, 2], "source_pages"), ([0, 0], [1, -1], "target_pages")):
        cache = b.array(np.arange(3)[:, None] * np.ones((3, 16)), "float32")
        pairs = b.array(source, "int32"), b.array(target, "int32")
        if b.device == "cpu":
            with pytest.raises(ValueError, match=rf"copy_pages: {word} names no page"):
                pyinfer.copy_pages(cache, *pairs)
            assert (b.float64(cache)[1] == 1).all()
        else:
            pyinfer.copy_pages(cache, *pairs)
            np.testing.assert_array_equal(b.float64(cache)[:, 0], [0, 0, 2])


def test_errors(backend: Backend) -> None:
    b = with_fp8(backend)
    new, cache = b.full((2, 2, 64), 1.0, "float16"), b.full((3, 2, 4, 2, 64), 1.0, "float16")
    small = b.full((3, 2, 4, 2, 64), 1.0, FP8[0])
    index, pages, last = (
        b.array([0, 0], "int32"),
        (b.array([0, 1], "int32"), b.array([0, 2], "int32")),
        b.array([4], "int32"),
    )

    def append(caches, **scales):
        pyinfer.append_paged_kv_cache(new, new, index, index, caches, *pages, last, **scales)

    append(small, k_scale=2.0)
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: k_scale is given where nothing is rounded: got 2.0"):
        append(cache, k_scale=2.0)
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: v_scale is no scale: got -1"):
        append(small, v_scale=-1)
    with pytest.raises(
        ValueError,
        match=r"append_paged_kv_cache: v_scale has the wrong number of elements: got 3 .*one for each of 2 heads",
    ):
        append(small, v_scale=b.full((3,), 1.0, "float32"))
    with pytest.raises(TypeError, match=r"append_paged_kv_cache: append_value differs in dtype from append_key"):
        pyinfer.append_paged_kv_cache(new, b.full((2, 2, 64), 1.0, "float32"), index, index, small, *pages, last)
    with pytest.raises(ValueError, match=r"append_paged_mla_kv_cache: ckv_scale is given"):
        pyinfer.append_paged_mla_kv_cache(
            new[:, 0], new[:, 0], index, index, cache[:, 0, :, 0], cache[:, 1, :, 0], *pages, last, ckv_scale=1.0
        )

    def gather(caches=cache, positions=index, **more):
        return pyinfer.gather_paged_kv_cache(index, positions, caches, *pages, **more)

    gather()
    with pytest.raises(TypeError, match=r"gather_paged_kv_cache: dtype cannot be made: got float32, wanted float16"):
        gather(dtype="float32")
    with pytest.raises(TypeError, match=r"gather_paged_kv_cache: [kv]_out cannot be made: got float32"):
        gather(v_out=b.full((2, 2, 64), 0.0, "float32"))
    with pytest.raises(TypeError, match=r"gather_paged_kv_cache: v_out has the wrong dtype: got float32"):
        gather(k_out=new, v_out=b.full((2, 2, 64), 0.0, "float32"))
    with pytest.raises(ValueError, match=r"gather_paged_kv_cache: v_out has the wrong shape"):
        gather(v_out=new[:1])
    with pytest.raises(ValueError, match=r"gather_paged_kv_cache: k_scale is given where nothing is rounded"):
        gather(k_scale=1.0)
    with pytest.raises(ValueError, match=r"gather_paged_kv_cache: kv_layout"):
        gather(kv_layout="X")
    if b.device == "cpu":
        with pytest.raises(ValueError, match=r"gather_paged_kv_cache: positions lies beyond the pages"):
            gather(positions=b.array([0, 9], "int32"))
        with pytest.raises(ValueError, match=r"copy_pages: target_pages names a page that is a target twice"):
            pyinfer.copy_pages(cache, index, index)
        with pytest.raises(
            ValueError, match=r"copy_pages: target_pages names a page that is a target twice, or a source too"
        ):
            pyinfer.copy_pages(cache, b.array([0, 1], "int32"), b.array([1, 2], "int32"))
    one = b.array([0], "int32")
    with pytest.raises(ValueError, match=r"copy_pages: target_pages has the wrong shape"):
        pyinfer.copy_pages(cache, index, one)
    with pytest.raises(TypeError, match=r"copy_pages: out differs in dtype from cache"):
        pyinfer.copy_pages(cache, one, one, small)
    with pytest.raises(ValueError, match=r"copy_pages: out has the wrong shape"):
        pyinfer.copy_pages(cache, one, one, cache[:, 0])
    with pytest.raises(ValueError, match=r"copy_pages: out has another number of tensors"):
        pyinfer.copy_pages((cache, cache), one, one, cache)
    with pytest.raises(TypeError, match=r"copy_pages: source_pages has the wrong dtype"):
        pyinfer.copy_pages(cache, new[0, 0], one)


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_vector_offsets(backend: Backend, rng: np.random.Generator, block_size: int) -> None:
    b = backend
    lengths = np.array([5, 0, 40, 16])
    table = reference.PageTable(rng, lengths, block_size)
    out_indptr = np.concatenate([[0], np.cumsum(lengths)]) + 3
    out = b.array(np.full(int(lengths.sum()) + 5, -7), "int32")
    given = [b.array(x, "int32") for x in (table.kv_indices, table.kv_indptr)]
    rest = [b.array(x, "int32") for x in (out_indptr, lengths)]
    got = pyinfer.block_sparse_indices_to_vector_sparse_offsets(*given, out, *rest, 1000, 7, block_size)
    if block_size == 1:
        np.testing.assert_array_equal(b.numpy(got), table.kv_indices * 1000)
        return
    assert got is out
    want = np.full(int(lengths.sum()) + 5, -7)
    for r, length in enumerate(lengths):
        for i in range(length):
            want[out_indptr[r] + i] = table.kv_indices[table.kv_indptr[r] + i // block_size] * 1000 + i % block_size * 7
    np.testing.assert_array_equal(b.numpy(out), want)


def test_vector_offsets_errors(backend: Backend) -> None:
    b = backend
    ints = lambda *v: b.array(np.array(v), "int32")  # noqa: E731
    op = pyinfer.block_sparse_indices_to_vector_sparse_offsets

    def fails(kind, text, *arguments):
        with pytest.raises(kind, match=f"block_sparse_indices_to_vector_sparse_offsets: {text}"):
            op(*arguments)

    good = (ints(3, 1), ints(0, 2), ints(0, 0, 0), ints(0, 3), ints(3))
    op(*good, 10, 1, 2)
    fails(ValueError, "block_size is too small", *good, 10, 1, 0)
    fails(TypeError, "kv_lens has the wrong dtype: got int64", *good[:4], b.array([3], "int64"), 10, 1, 2)
    fails(ValueError, "out_indptr has the wrong shape", *good[:3], ints(0), good[4], 10, 1, 2)
    fails(TypeError, "indices has the wrong dtype", b.full((2,), 1.0, "float32"), *good[1:], 10, 1, 1)
    if b.device == "cpu":
        fails(
            ValueError, r"kv_lens does not fit the request's blocks \(request 0\): got 5", *good[:4], ints(5), 10, 1, 2
        )
        fails(ValueError, "kv_lens goes beyond out_offsets", *good[:3], ints(1, 4), good[4], 10, 1, 2)
        fails(ValueError, "kv_lens gives an offset beyond 32 bits", *good, 1 << 30, 1, 2)
