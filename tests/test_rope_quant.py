"""Rotation with rounding to 8 bits and with the append to a paged cache, against float64 and against the separate operators."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer import _rope_launch
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits, with_fp8
from tests.reference import page as page_reference
from tests.reference import rope as reference
from tests.reference.quantization_fp8 import assert_rounded

FP8 = ["float8_e4m3fn", "float8_e5m2"]
NEAR = 2e-6
# (query heads, kv heads, rotated, not rotated): Llama, partial, a sixth of everything odd, latent attention (kv heads 0).
SHAPES = [(8, 2, 128, 0), (4, 4, 32, 96), (3, 1, 6, 5), (5, 0, 64, 512), (2, 0, 16, 24)]


class Case:
    """Heads [tokens, heads, rotated + not rotated], a table of angles, positions, and what float64 makes of them."""

    def __init__(self, b: Backend, rng: np.random.Generator, shape, dtype: str, is_neox: bool, tokens: int = 7) -> None:
        q_heads, kv_heads, self.rope, nope = shape
        self.b, self.mla = b, not kv_heads
        self.heads = max(1, kv_heads)
        self.q = b.array(rng.standard_normal((tokens, q_heads, self.rope + nope)) * 20, dtype)
        k = rng.standard_normal((tokens, self.heads, self.rope + nope)) * 20
        self.k = b.array(k[:, 0] if self.mla else k, dtype)
        angle = rng.uniform(0, 6.3, (50, self.rope // 2))
        self.table = b.array(np.concatenate([np.cos(angle), np.sin(angle)], axis=1), "float32")
        self.pos = rng.integers(0, 50, tokens)
        self.pos_ids = b.array(self.pos, rng.choice(["int32", "int64"]))
        rows = b.float64(self.table)[self.pos]
        cosine, sine = rows[:, : self.rope // 2], rows[:, self.rope // 2 :]
        self.want_q = reference.rotate(b.float64(self.q), cosine, sine, not is_neox)
        self.want_k = reference.rotate(b.float64(self.k).reshape(k.shape), cosine, sine, not is_neox)
        self.is_neox, self.nope = is_neox, nope

    def parts(self, x):
        return x[..., : self.rope], x[..., self.rope :] if self.nope else None

    def inputs(self):
        (q_rope, q_nope), (k_rope, k_nope) = self.parts(self.q), self.parts(self.k)
        return q_rope, k_rope, q_nope, k_nope

    def slack(self, want: np.ndarray, factor: float) -> float:
        """A difference of products is off by what the products are."""
        return NEAR * float(np.abs(want).max()) * factor


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(backend_arrays: Backend, rng: np.random.Generator, shape, is_neox: bool) -> None:
    b = backend_arrays
    for dtype, name in (("bfloat16", FP8[0]), ("float16", FP8[1])):
        c = Case(b, rng, shape, dtype, is_neox)
        op = pyinfer.mla_rope_quantize_fp8 if c.mla else pyinfer.rope_quantize_fp8
        scales = (2.5, 0.75)
        got = op(*c.inputs(), c.table, c.pos_ids, is_neox, name, *scales)
        assert len(got) == 4
        q, k = (np.concatenate([b.float64(got[i]), b.float64(got[i + 2])], axis=-1) for i in (0, 1))
        assert_rounded(q, c.want_q * scales[0], name, NEAR, c.slack(c.want_q, scales[0]), "queries")
        assert_rounded(
            k.reshape(c.want_k.shape), c.want_k * scales[1], name, NEAR, c.slack(c.want_k, scales[1]), "keys"
        )
        # The same into parts of wider tensors.
        wide = [b.full((*x.shape[:-1], x.shape[-1] + 16), np.nan, name) for x in got]
        outs = [w[..., 16:] for w in wide]
        same = op(*c.inputs(), c.table, c.pos_ids, is_neox, None, *scales, *outs)
        for w, o, x, y in zip(wide, outs, same, got, strict=True):
            assert x is o
            assert_same_bits(b.numpy(x), b.numpy(y))
            assert np.isnan(b.float64(w)[..., :16]).all(), "written outside"


class Table:
    """A page table and places for the tokens of two requests; one token has no place."""

    def __init__(self, b: Backend, rng: np.random.Generator, page_size: int, tokens: int = 7) -> None:
        self.table = page_reference.PageTable(rng, np.array([3 * page_size, 2 * page_size]), page_size)
        self.batch_indices = rng.integers(0, 2, tokens)
        spots = rng.permutation(2 * page_size)[:tokens]
        self.positions = spots
        self.batch_indices[3] = -1
        t = self.table
        arrays = (t.kv_indices, t.kv_indptr, self.batch_indices, self.positions)
        self.arrays = [b.array(x, rng.choice(["int32", "int64"])) for x in arrays]

    def append(self, cache: np.ndarray, source: np.ndarray) -> np.ndarray:
        t = self.table
        return page_reference.append(cache, source, self.batch_indices, self.positions, t.kv_indices, t.kv_indptr)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_append(backend_arrays: Backend, rng: np.random.Generator, shape, layout: str) -> None:
    """Bits are those of rope_quantize_fp8 and of a copy to the token's place; everything else in the cache stays."""
    b = backend_arrays
    for dtype, name, is_neox in (("bfloat16", FP8[0], True), ("float16", FP8[1], False)):
        c, page_size = Case(b, rng, shape, dtype, is_neox), 8
        t = Table(b, rng, page_size)
        scales = (1.5, 0.5)
        q_rope, k_rope, q_nope, k_nope = pyinfer.rope_quantize_fp8(
            *c.inputs(), c.table, c.pos_ids, is_neox, name, *scales
        )
        key = np.concatenate([b.numpy(k_rope), b.numpy(k_nope)], axis=-1)
        key = key.reshape(len(c.pos), c.heads, -1)
        pages = t.table.num_pages
        value_dim = 24 if shape == SHAPES[1] else shape[2] + shape[3]
        v = None if c.mla else b.array(rng.standard_normal((len(c.pos), c.heads, value_dim)), dtype)
        before = [np.full((pages, page_size, c.heads, d), 3.0).astype(key.dtype) for d in (key.shape[-1], value_dim)]
        if c.mla:
            caches = (b.array(before[0][..., 0, c.rope :]), b.array(before[0][..., 0, : c.rope]))
        else:
            order = (0, 1, 2, 3) if layout == "NHD" else (0, 2, 1, 3)
            caches = tuple(b.array(np.ascontiguousarray(x.transpose(order))) for x in before)
        out = pyinfer.rope_quantize_fp8_append_paged_kv_cache(
            *c.inputs(), v, c.table, c.pos_ids, caches, *t.arrays, is_neox, name, *scales, page_size, layout
        )
        assert_same_bits(b.numpy(out[0]), b.numpy(q_rope), "queries")
        assert_same_bits(b.numpy(out[1]), b.numpy(q_nope), "queries, not rotated")
        got = [b.numpy(x) for x in caches]
        if c.mla:
            got_keys = np.concatenate([got[1], got[0]], axis=-1)[:, :, None]
        else:
            got_keys = got[0].transpose(order)
            values = np.zeros((len(c.pos), c.heads, value_dim))
            got_values, wanted = (
                got[1].transpose(order).astype(np.float64),
                t.append(before[1].astype(np.float64), b.float64(v) * scales[1]),
            )
            assert_rounded(got_values, wanted, name, 1e-6, what=f"values {values.shape}")
        assert_same_bits(np.ascontiguousarray(got_keys), t.append(before[0], key), "keys")


@pytest.mark.parametrize("combined", [False, True], ids=["pair", "one tensor"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 2, 128, 0), (4, 4, 32, 96), (3, 1, 6, 6)], ids=str)
def test_append(backend_arrays: Backend, rng: np.random.Generator, shape, dtype: str, combined: bool) -> None:
    """The dtype stays: the rotated queries and keys are those of the cached operator, the cache that of the append."""
    b = backend_arrays
    for layout, is_neox, in_place in (("NHD", True, False), ("HND", False, True)):
        c, page_size = Case(b, rng, shape, dtype, is_neox), 4
        t = Table(b, rng, page_size, 7)
        heads, dim = c.heads, c.rope + c.nope
        v = b.array(rng.standard_normal((len(c.pos), heads, dim)), dtype)
        cache_shape = (
            (t.table.num_pages, page_size, heads, dim)
            if layout == "NHD"
            else (t.table.num_pages, heads, page_size, dim)
        )
        poison = [b.full(cache_shape, np.nan, dtype) for _ in range(4)]
        if combined:
            both = b.full((cache_shape[0], 2, *cache_shape[1:]), np.nan, dtype)
            caches = (both[:, 0], both[:, 1])
        else:
            both = caches = tuple(poison[:2])
        k_before = b.numpy(c.k).copy()
        rows = len(c.pos)
        flat_q, flat_k = b.array(b.numpy(c.q).reshape(rows, -1)), b.array(b.numpy(c.k).reshape(rows, -1))
        want_q, want_k = pyinfer.apply_rope_with_cos_sin_cache(c.pos_ids, flat_q, flat_k, dim, c.table, is_neox)
        kv_indices, kv_indptr, batch_indices, positions = t.arrays
        want = tuple(poison[2:])
        last = b.array(np.full(2, 1), "int32")
        k_rotated = b.array(b.numpy(want_k).reshape(rows, heads, dim))
        pyinfer.append_paged_kv_cache(k_rotated, v, batch_indices, positions, want, kv_indices, kv_indptr, last, layout)
        q_out = c.q if in_place else None
        out = pyinfer.rope_append_paged_kv_cache(
            c.q, c.k, v, c.table, c.pos_ids, both, *t.arrays, is_neox, layout, q_out
        )
        assert (out is c.q) == in_place
        tolerance = 4 * EPSILON[dtype]
        assert_close(b.float64(out).reshape(rows, -1), b.float64(want_q), rtol=tolerance)
        for got, expected in zip(caches, want, strict=True):
            assert_close(b.float64(got), b.float64(expected), rtol=tolerance, name="cache")
        assert_same_bits(b.numpy(caches[1]), b.numpy(want[1]), "values")
        assert_same_bits(b.numpy(c.k), k_before, "the keys given")


@pytest.mark.parametrize("shape", [(8, 2, 128, 0), (80, 50, 64, 0), (4, 4, 32, 96), (3, 1, 6, 6)], ids=str)
def test_as_with_many_tokens(
    backend_arrays: Backend, rng: np.random.Generator, shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several heads a thread; of the second shape a block that has no keys."""
    monkeypatch.setattr("pyinfer.jit.rope.MANY_TOKENS", 1)
    _rope_launch.calls.clear()
    test_append(backend_arrays, rng, shape, "bfloat16", False)
    test_quantize_append(backend_arrays, rng, shape, "NHD")
    _rope_launch.calls.clear()


def test_position_outside_the_table(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    c = Case(b, rng, (2, 1, 16, 8), "float16", True)
    pos = c.pos.copy()
    pos[2] = 50
    bad = b.array(pos, "int32")
    if b.device == "cpu":
        with pytest.raises(
            ValueError, match=r"rope_quantize_fp8: pos_ids lies outside cos_sin_cache: got 50, wanted 0 to 49"
        ):
            pyinfer.rope_quantize_fp8(*c.inputs(), c.table, bad)
    else:
        q_rope, k_rope, q_nope, _ = pyinfer.rope_quantize_fp8(*c.inputs(), c.table, bad)
        assert np.isnan(b.float64(q_rope)[2]).all() and np.isnan(b.float64(k_rope)[2]).all()
        assert not np.isnan(b.float64(q_nope)).any() and not np.isnan(b.float64(q_rope)[[0, 1, 3]]).any()


def test_saturation_and_nan(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    c = Case(b, rng, (2, 1, 16, 8), "bfloat16", True)
    q = b.numpy(c.q).copy()
    q[1, 0, 3] = np.nan
    q[2, 1, 20] = np.inf
    c.q = b.array(q)
    q_rope, _, q_nope, _ = pyinfer.rope_quantize_fp8(*c.inputs(), c.table, c.pos_ids, quant_scale_q=1e6)
    got = b.float64(q_rope)
    assert set(np.flatnonzero(np.isnan(got[1, 0]))) == {3, 11}, "the pair of the NaN, and nothing else"
    assert (np.abs(got[~np.isnan(got)]) == 448).mean() > 0.99
    assert b.float64(q_nope)[2, 1, 4] == 448


def test_empty(backend: Backend, rng: np.random.Generator) -> None:
    b = with_fp8(backend)
    q, k, table = (
        b.full((0, 2, 16), 0.0, "float16"),
        b.full((0, 1, 16), 0.0, "float16"),
        b.full((9, 16), 0.0, "float32"),
    )
    none = b.array(np.zeros(0), "int32")
    got = pyinfer.rope_quantize_fp8(q, k, None, None, table, none)
    assert [tuple(x.shape) for x in got] == [(0, 2, 16), (0, 1, 16), (0, 2, 0), (0, 1, 0)] and b.is_own(got[0])
    cache = b.full((2, 2, 4, 1, 16), 1.0, "float16")
    pages = (b.array([0], "int32"), b.array([0, 1], "int32"), none, none)
    assert tuple(pyinfer.rope_append_paged_kv_cache(q, k, k, table, none, cache, *pages).shape) == (0, 2, 16)
    assert (b.float64(cache) == 1).all()


def test_errors(backend: Backend, rng: np.random.Generator) -> None:
    b = with_fp8(backend)
    c = Case(b, rng, (4, 2, 16, 8), "float16", True)
    q_rope, k_rope, q_nope, k_nope = c.inputs()
    op = pyinfer.rope_quantize_fp8

    def fails(kind, text, *arguments, **more):
        with pytest.raises(kind, match=text):
            op(*arguments, **more)

    fails(
        TypeError,
        "q_rope has the wrong dtype: got float32",
        b.full((7, 4, 16), 1.0, "float32"),
        k_rope,
        None,
        None,
        c.table,
        c.pos_ids,
    )
    fails(ValueError, "q_nope is missing where k_nope is given", q_rope, k_rope, None, k_nope, c.table, c.pos_ids)
    fails(ValueError, "k_nope is missing where q_nope is given", q_rope, k_rope, q_nope, None, c.table, c.pos_ids)
    fails(ValueError, "k_rope has the wrong shape", q_rope, k_rope[:5], q_nope, k_nope, c.table, c.pos_ids)
    fails(
        ValueError,
        "cos_sin_cache has another rotary dimension: got 8, wanted 16",
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        c.table[:, :8],
        c.pos_ids,
    )
    fails(ValueError, "cos_sin_cache has the wrong dtype", q_rope, k_rope, q_nope, k_nope, q_rope[0], c.pos_ids)
    fails(ValueError, "pos_ids has the wrong shape", q_rope, k_rope, q_nope, k_nope, c.table, c.pos_ids[:3])
    fails(
        ValueError,
        "quant_scale_kv is no scale: got 0.0",
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        c.table,
        c.pos_ids,
        quant_scale_kv=0,
    )
    fails(
        TypeError,
        "quantize_dtype is no 8-bit float",
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        c.table,
        c.pos_ids,
        quantize_dtype="int8",
    )
    fails(
        TypeError,
        "q_rope_out has the wrong dtype",
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        c.table,
        c.pos_ids,
        q_rope_out=q_rope,
        quantize_dtype=FP8[0],
    )
    fails(
        ValueError,
        "k_nope_out has the wrong shape",
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        c.table,
        c.pos_ids,
        k_nope_out=b.full((7, 2, 9), 0.0, FP8[0]),
    )
    fails(TypeError, "k_rope is no tensor", q_rope, None, q_nope, k_nope, c.table, c.pos_ids)
    fails(TypeError, "q_rope is missing", None, k_rope, q_nope, k_nope, c.table, c.pos_ids)

    t = Table(b, rng, 4)
    caches = tuple(b.full((t.table.num_pages, 4, 2, 24), 0.0, FP8[0]) for _ in range(2))
    op = pyinfer.rope_quantize_fp8_append_paged_kv_cache
    v = b.full((7, 2, 24), 1.0, "float16")
    good = (q_rope, k_rope, q_nope, k_nope, v, c.table, c.pos_ids, caches, *t.arrays)

    def replaced(**changes):
        names = (
            "q_rope",
            "k_rope",
            "q_nope",
            "k_nope",
            "v",
            "table",
            "pos",
            "caches",
            "kv_indices",
            "kv_indptr",
            "batch_indices",
            "positions",
        )
        return [changes.get(n, x) for n, x in zip(names, good, strict=True)]

    op(*good, page_size=4)
    fails(ValueError, "page_size is not the cache's: got 16, wanted 4", *good)
    fails(ValueError, "v is missing", *replaced(v=None), page_size=4)
    fails(TypeError, "paged_kv_cache is no pair: got list of 2", *replaced(caches=list(caches)), page_size=4)
    fails(ValueError, r"paged_kv_cache\[1\] has other pages", *replaced(caches=(caches[0], caches[1][1:])), page_size=4)
    fails(
        ValueError,
        r"paged_kv_cache\[0\] has the wrong shape",
        *replaced(caches=(caches[0][..., :8], caches[1])),
        page_size=4,
    )
    fails(TypeError, r"paged_kv_cache\[0\] has the wrong dtype", *good, page_size=4, quantize_dtype=FP8[1])
    fails(ValueError, "kv_layout is no layout", *good, page_size=4, kv_layout="DNH")
    fails(ValueError, "positions has the wrong shape", *replaced(positions=t.arrays[3][:2]), page_size=4)
    latent = (q_rope, k_rope[:, 0], q_nope, k_nope[:, 0])
    fails(ValueError, "v is given for keys without heads", *latent, *good[4:], page_size=4)
    ckv, kpe = b.full((9, 4, 8), 0.0, FP8[0]), b.full((9, 4, 16), 0.0, FP8[0])
    fails(
        ValueError,
        "k_nope is missing for keys without heads",
        latent[0],
        latent[1],
        None,
        None,
        None,
        *good[5:7],
        (ckv, kpe),
        *t.arrays,
        page_size=4,
    )
    fails(ValueError, "ckv_cache has the wrong shape", *latent, None, *good[5:7], (kpe, ckv), *t.arrays, page_size=4)

    op = pyinfer.rope_append_paged_kv_cache
    both = b.full((t.table.num_pages, 2, 4, 2, 24), 0.0, "float16")
    plain = (c.q, c.k, v, c.table, c.pos_ids)
    op(*plain, both, *t.arrays)
    fails(TypeError, r"paged_kv_cache \(K\) has the wrong dtype: got float8_e4m3fn", *plain, caches, *t.arrays)
    fails(TypeError, "q_out differs in dtype from q", *plain, both, *t.arrays, q_out=b.full((7, 4, 24), 0.0, "float32"))
    fails(ValueError, r"paged_kv_cache \(V\) has other pages", *plain, (both[:, 0], both[1:, 1]), *t.arrays)
    fails(ValueError, "k has the wrong shape", c.q, c.k[..., :16], v, c.table, c.pos_ids, both, *t.arrays)


@pytest.mark.compile
def test_rotary_blocks() -> None:
    """All heads and all chunks have a block."""
    from pyinfer.jit.rope import COPIES, rope_config, rotary_blocks

    shapes = (((32, 8, 0), 64, 0, 128), ((128, 1, 128), 32, 512, 0), ((80, 50, 0), 32, 0, 64), ((3, 2, 3), 8, 8, 0))
    for heads, pairs, nope, value in shapes:
        for tokens in (1, 4096):
            c = rope_config(pairs // 8, heads[0] + heads[1], tokens)
            parts, rotate = rotary_blocks(heads, pairs, nope, value, 8, c)
            chunks = ((heads[2] + heads[1]) * nope + heads[1] * value) // 8
            each = pairs // 8 * c.heads * COPIES
            assert rotate * c.heads * c.unroll >= heads[0] + heads[1] > (rotate - 1) * c.heads * c.unroll
            assert (parts - rotate) * each >= chunks > (parts - rotate - 1) * each
