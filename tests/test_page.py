"""Paged KV cache upkeep: positions of new tokens, lengths, appending; bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import NUMPY_DTYPES, Backend, assert_same_bits
from tests.reference import page as reference

DTYPES = ["float16", "bfloat16", "float32", "float8_e4m3fn"]


def bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random bit patterns, NaNs among them: appending moves bits."""
    d = NUMPY_DTYPES.get(dtype) or np.dtype(dtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * d.itemsize), dtype=np.uint8).view(d)


@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("batch", [0, 1, 5, 300])
def test_batch_indices_positions(backend: Backend, rng: np.random.Generator, batch: int, integer: str) -> None:
    b = backend
    lengths = rng.integers(0, 9, batch)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    seq_lens = lengths + rng.integers(0, 1000, batch)
    nnz = int(indptr[-1]) + 3
    got = pyinfer.get_batch_indices_positions(b.array(indptr, integer), b.array(seq_lens, integer), nnz)
    want = reference.batch_indices_positions(indptr, seq_lens, nnz)
    for x, y, name in zip(got, want, ("batch_indices", "positions"), strict=True):
        assert b.is_own(x)
        assert_same_bits(b.numpy(x), y, name)
    assert (want[1][-3:] == -1).all()


def test_batch_indices_positions_long_request(backend_arrays: Backend) -> None:
    """A prefill of 70000 tokens beside a decode step: several blocks per request on a GPU. Results go to given tensors."""
    b = backend_arrays
    indptr, seq_lens = np.array([2, 3, 70002]), np.array([17, 70100])
    outputs = (b.full((70005,), -7, "int32"), b.full((70005,), -7, "int32"))
    got = pyinfer.get_batch_indices_positions(b.array(indptr, "int32"), b.array(seq_lens, "int64"), 70005, *outputs)
    assert got[0] is outputs[0] and got[1] is outputs[1]
    want_b, want_p = np.full(70005, -1, np.int32), np.full(70005, -1, np.int32)
    want_b[2], want_p[2] = 0, 16
    want_b[3:70002], want_p[3:70002] = 1, np.arange(101, 70100)
    assert_same_bits(b.numpy(got[0]), want_b)
    assert_same_bits(b.numpy(got[1]), want_p)


@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("page_size", [1, 16, 5])
def test_seq_lens(backend: Backend, rng: np.random.Generator, page_size: int, integer: str) -> None:
    b = backend
    lengths = rng.integers(0, 100, 300)
    table = reference.PageTable(rng, lengths, page_size)
    got = pyinfer.get_seq_lens(b.array(table.kv_indptr, integer), b.array(table.last_page_len, "int32"), page_size)
    assert b.is_own(got)
    assert_same_bits(b.numpy(got), lengths.astype(np.int32))


class Case:
    """Requests of random lengths, of which the last few tokens are appended, in one of the cache's forms."""

    def __init__(
        self,
        b: Backend,
        rng: np.random.Generator,
        dtype: str,
        layout: str,
        combined: bool,
        page_size: int,
        heads: int,
        dim: int,
        integer: str = "int32",
    ) -> None:
        lengths = rng.integers(0, 40, 6)
        self.table = reference.PageTable(rng, lengths, page_size)
        new = np.minimum(lengths, rng.integers(0, 12, 6))
        self.indptr = np.concatenate([[0], np.cumsum(new)])
        nnz = int(self.indptr[-1]) + 2  # and two rows of no request
        self.batch_indices, self.positions = reference.batch_indices_positions(self.indptr, lengths, nnz)
        self.key, self.value = bits(rng, (nnz, heads, dim), dtype), bits(rng, (nnz, heads, dim), dtype)
        self.before = [bits(rng, (self.table.num_pages, page_size, heads, dim), dtype) for _ in range(2)]
        self.layout, self.combined, self.b = layout, combined, b
        caches = [c if layout == "NHD" else c.swapaxes(1, 2) for c in self.before]
        self.cache = (
            b.array(np.stack(caches, axis=1)) if combined else tuple(b.array(np.ascontiguousarray(c)) for c in caches)
        )
        t = self.table
        self.indices = [b.array(x, integer) for x in (self.batch_indices, self.positions)]
        self.page_table = [b.array(x, integer) for x in (t.kv_indices, t.kv_indptr, t.last_page_len)]

    def check(self, cache) -> None:
        k, v = (cache[:, 0], cache[:, 1]) if self.combined else cache
        t = self.table
        for name, got, before, source in (("K", k, self.before[0], self.key), ("V", v, self.before[1], self.value)):
            want = reference.append(before, source, self.batch_indices, self.positions, t.kv_indices, t.kv_indptr)
            host = self.b.numpy(got)
            assert_same_bits(host if self.layout == "NHD" else host.swapaxes(1, 2), want, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("page_size,heads,dim", [(1, 2, 64), (16, 3, 64), (5, 1, 36), (16, 8, 128), (4, 2, 3)])
def test_append(
    backend_arrays: Backend,
    rng: np.random.Generator,
    page_size: int,
    heads: int,
    dim: int,
    combined: bool,
    layout: str,
    dtype: str,
) -> None:
    b = backend_arrays
    case = Case(b, rng, dtype, layout, combined, page_size, heads, dim, rng.choice(["int32", "int64"]))
    key, value = b.array(case.key), b.array(case.value)
    assert pyinfer.append_paged_kv_cache(key, value, *case.indices, case.cache, *case.page_table, layout) is None
    case.check(case.cache)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_strided(backend: Backend, rng: np.random.Generator, layout: str) -> None:
    """K and V cut out of one qkv tensor, caches whose pages lie apart; what lies between stays as it was."""
    b, dtype = backend, "float16"
    case = Case(b, rng, dtype, layout, False, 8, 2, 64, "int32")
    nnz = len(case.batch_indices)
    qkv = bits(rng, (nnz, 8, 70), dtype)
    qkv[:, 4:6, 3:67], qkv[:, 6:8, 3:67] = case.key, case.value
    qkv = b.array(qkv)
    wide = [
        bits(rng, (c.shape[0] * 2, *c.shape[1:-1], c.shape[-1] + 9), dtype)
        for c in (case.before if layout == "NHD" else [x.swapaxes(1, 2) for x in case.before])
    ]
    for w, before in zip(wide, case.before, strict=True):
        w[::2, ..., 5:69] = before if layout == "NHD" else before.swapaxes(1, 2)
    tensors = [b.array(w) for w in wide]
    cache = tuple(t[::2, ..., 5:69] for t in tensors)
    pyinfer.append_paged_kv_cache(qkv[:, 4:6, 3:67], qkv[:, 6:8, 3:67], *case.indices, cache, *case.page_table, layout)
    case.check(cache)
    for w, t in zip(wide, tensors, strict=True):
        host = b.numpy(t).copy()
        host[::2, ..., 5:69] = w[::2, ..., 5:69]
        assert_same_bits(host, w, "between the pages")


@pytest.mark.parametrize("combined", [False, True])
def test_page_axis_left_out(backend_arrays: Backend, rng: np.random.Generator, combined: bool) -> None:
    b = backend_arrays
    case = Case(b, rng, "bfloat16", "NHD", combined, 1, 2, 64)
    cache = case.cache.squeeze(2) if combined else tuple(c.squeeze(1) for c in case.cache)
    pyinfer.append_paged_kv_cache(b.array(case.key), b.array(case.value), *case.indices, cache, *case.page_table)
    case.check(case.cache)


def test_different_head_dims(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """Keys of 192 and values of 128 elements, as in DeepSeek's prefill; and the latent cache of one head."""
    b = backend_arrays
    table = reference.PageTable(rng, np.array([9, 20]), 4)
    batch_indices, positions = np.array([1, 0, 1, -1]), np.array([19, 8, 0, 3])
    index = [b.array(x, "int32") for x in (batch_indices, positions)]
    pages = [b.array(x, "int32") for x in (table.kv_indices, table.kv_indptr, table.last_page_len)]
    for heads, dims in ((3, (192, 128)), (1, (512, 64))):
        before = [bits(rng, (table.num_pages, 4, heads, d), "bfloat16") for d in dims]
        new = [bits(rng, (4, heads, d), "bfloat16") for d in dims]
        want = [
            reference.append(c, n, batch_indices, positions, table.kv_indices, table.kv_indptr)
            for c, n in zip(before, new, strict=True)
        ]
        caches = tuple(b.array(c) for c in before)
        pyinfer.append_paged_kv_cache(*(b.array(n) for n in new), *index, caches, *pages)
        for got, w in zip(caches, want, strict=True):
            assert_same_bits(b.numpy(got), w)
        if heads == 1:
            caches = [b.array(c[:, :, 0]) for c in before]
            pyinfer.append_paged_mla_kv_cache(*(b.array(n[:, 0]) for n in new), *index, *caches, *pages)
            for got, w in zip(caches, want, strict=True):
                assert_same_bits(b.numpy(got), w[:, :, 0])


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_latent_cache_halves_of_one_tensor(backend_arrays: Backend, rng: np.random.Generator, page_size: int) -> None:
    """The latent and the rotary part as halves of one cache and of one input; what was there otherwise stays."""
    b = backend_arrays
    table = reference.PageTable(rng, np.array([5, 300, 1]), page_size)
    batch_indices, positions = np.array([1, 0, 2, 1, 1, -1]), np.array([299, 4, 0, 0, 255, 7])
    before = bits(rng, (table.num_pages, page_size, 1, 576), "float16")
    new = bits(rng, (6, 1, 576), "float16")
    cache, rows = b.array(before[:, :, 0]), b.array(new[:, 0])
    index = [b.array(x, "int32") for x in (batch_indices, positions)]
    pages = [b.array(x, "int32") for x in (table.kv_indices, table.kv_indptr, table.last_page_len)]
    halves = (rows[:, :512], rows[:, 512:], *index, cache[..., :512], cache[..., 512:], *pages)
    pyinfer.append_paged_mla_kv_cache(*halves)
    want = reference.append(before, new, batch_indices, positions, table.kv_indices, table.kv_indptr)
    assert_same_bits(b.numpy(cache), want[:, :, 0])
    with pytest.raises(ValueError, match="append_paged_mla_kv_cache: append_kpe has the wrong number of axes: got 1"):
        pyinfer.append_paged_mla_kv_cache(rows[:, :512], rows[0, 512:], *halves[2:])
    with pytest.raises(ValueError, match="append_paged_mla_kv_cache: kpe_cache has the wrong shape"):
        pyinfer.append_paged_mla_kv_cache(*halves[:5], cache[..., :64][:, : page_size - 1 or None][1:], *pages)


def test_far_page(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """A page more than 2^31 bytes (and 2^31 elements) into the cache: strides and offsets are 64 bits wide. The memory between is never touched."""
    b = backend_arrays
    if b.device == "cpu":
        pages, stride = 3, 1 << 20  # elements; the address space is not reserved for real on the CPU
    else:
        pages, stride = 3, (1 << 30) + 64
    import torch

    store = torch.empty(2 * stride + 64, dtype=torch.int16, device=b.device)
    cache = store.as_strided((pages, 1, 1, 64), (stride, 64, 64, 1))
    other = torch.zeros((pages, 1, 1, 64), dtype=torch.int16, device=b.device)
    new = torch.arange(64, dtype=torch.int16, device=b.device).reshape(1, 1, 64)
    integers = [b.array(x, "int32") for x in ([0], [1], [0, 2], [0, 2], [1])]
    pyinfer.append_paged_kv_cache(new, new, *integers[:2], (cache, other), *integers[2:])
    assert torch.equal(store[2 * stride : 2 * stride + 64], new.reshape(-1))
    assert torch.equal(other[2, 0, 0], new.reshape(-1))


def test_append_after_get(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """The way a model calls them: lengths from the page table, indices from the lengths, then the append."""
    b = backend_arrays
    case = Case(b, rng, "float16", "NHD", True, 8, 2, 64)
    seq_lens = pyinfer.get_seq_lens(case.page_table[1], case.page_table[2], 8)
    indices = pyinfer.get_batch_indices_positions(b.array(case.indptr, "int32"), seq_lens, len(case.batch_indices))
    pyinfer.append_paged_kv_cache(b.array(case.key), b.array(case.value), *indices, case.cache, *case.page_table)
    case.check(case.cache)


def test_nothing_to_append(backend: Backend) -> None:
    b = backend
    empty, cache = b.full((0, 2, 64), 0.0, "float16"), b.full((3, 2, 4, 2, 64), 1.0, "float16")
    none = b.array(np.zeros(0), "int32")
    pyinfer.append_paged_kv_cache(
        empty, empty, none, none, cache, b.array([0], "int32"), b.array([0, 1], "int32"), b.array([1], "int32")
    )
    assert (b.float64(cache) == 1).all()


@pytest.mark.parametrize(
    "batch,position,page",
    [(2, 0, 0), (1, 8, 0), (0, 4, 0), (1, 0, 9), (1, 0, -1)],
    ids=["no such request", "beyond the last page", "in the next request's page", "no such page", "negative page"],
)
def test_token_without_a_place(backend_arrays: Backend, batch: int, position: int, page: int) -> None:
    """The CPU says what is wrong and writes nothing; a GPU leaves the token out. Neither writes into somebody else's page."""
    b = backend_arrays
    new = b.full((2, 1, 8), 5.0, "float16")
    caches = tuple(b.full((9, 4, 1, 8), 1.0, "float16") for _ in range(2))
    batch_indices, positions = b.array([0, batch], "int32"), b.array([0, position], "int32")
    table = (b.array([3, page, 5], "int32"), b.array([0, 1, 3], "int32"), b.array([4, 4], "int32"))
    want = np.ones((9, 4, 1, 8))
    if b.device == "cpu":
        with pytest.raises(ValueError, match=r"append_paged_kv_cache: (batch_indices|positions|kv_indices) .*token 1"):
            pyinfer.append_paged_kv_cache(new, new, batch_indices, positions, caches, *table)
    else:
        pyinfer.append_paged_kv_cache(new, new, batch_indices, positions, caches, *table)
        want[3, 0] = 5
    for cache in caches:
        assert (b.float64(cache) == want).all()


def test_errors(backend: Backend) -> None:
    b = backend
    new, cache = b.full((2, 2, 64), 1.0, "float16"), b.full((3, 2, 4, 2, 64), 1.0, "float16")
    index = b.array([0, 0], "int32")
    table = (b.array([0, 1], "int32"), b.array([0, 2], "int32"), b.array([4], "int32"))

    def append(key=new, value=new, batch_indices=index, positions=index, caches=cache, pages=table, layout="NHD"):
        pyinfer.append_paged_kv_cache(key, value, batch_indices, positions, caches, *pages, layout)

    append()
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: kv_layout .*'NDH'"):
        append(layout="NDH")
    with pytest.raises(TypeError, match=r"append_paged_kv_cache: paged_kv_cache is a list"):
        append(caches=[cache[:, 0], cache[:, 1]])
    with pytest.raises(TypeError, match=r"append_paged_kv_cache: append_key differs in dtype"):
        append(key=b.full((2, 2, 64), 1.0, "float32"))
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: paged_kv_cache \(K\) has the wrong shape"):
        append(layout="HND")
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: append_value has the wrong shape"):
        append(value=b.full((3, 2, 64), 1.0, "float16"))
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: positions has the wrong shape"):
        append(positions=index[:1])
    with pytest.raises(TypeError, match=r"append_paged_kv_cache: positions .*float32"):
        append(positions=b.array([0, 0], "float32"))
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: kv_last_page_len"):
        append(pages=(table[0], table[1], index))
    with pytest.raises(ValueError, match=r"append_paged_kv_cache: kv_indptr is empty"):
        append(pages=(table[0], index[:0], index[:0]))
    with pytest.raises(ValueError, match=r"get_batch_indices_positions: seq_lens .*shape"):
        pyinfer.get_batch_indices_positions(index, index, 3)
    with pytest.raises(ValueError, match=r"get_batch_indices_positions: nnz is negative"):
        pyinfer.get_batch_indices_positions(index, index[:1], -1)
    with pytest.raises(ValueError, match=r"get_seq_lens: page_size"):
        pyinfer.get_seq_lens(index, index[:1], 0)
    if b.device == "cpu":
        with pytest.raises(ValueError, match=r"get_batch_indices_positions: append_indptr is not monotone"):
            pyinfer.get_batch_indices_positions(b.array([0, 3, 2], "int32"), index, 3)
        with pytest.raises(ValueError, match=r"get_batch_indices_positions: nnz is less"):
            pyinfer.get_batch_indices_positions(b.array([0, 3], "int32"), index[:1], 2)


@pytest.mark.gpu
def test_no_synchronisation(backend_arrays: Backend) -> None:
    """With torch's synchronisation check armed, none of the three operators trips it."""
    import torch

    b = backend_arrays
    rng = np.random.default_rng(0)
    case = Case(b, rng, "float16", "NHD", True, 8, 2, 64)
    key, value, indptr = b.array(case.key), b.array(case.value), b.array(case.indptr, "int32")
    nnz = len(case.batch_indices)
    for armed in (False, True):  # once to build the kernels
        torch.cuda.set_sync_debug_mode("error" if armed else "default")
        try:
            seq_lens = pyinfer.get_seq_lens(case.page_table[1], case.page_table[2], 8)
            indices = pyinfer.get_batch_indices_positions(indptr, seq_lens, nnz)
            pyinfer.append_paged_kv_cache(key, value, *indices, case.cache, *case.page_table)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    case.check(case.cache)
