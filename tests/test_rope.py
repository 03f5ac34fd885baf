"""Rotary position embedding against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits
from tests.reference import rope as reference

DTYPES = ["float16", "bfloat16", "float32"]
# Sines are good to 1e-6 absolute (sin.approx on a GPU), so an element is off by that times its pair, plus one rounding.
RTOL = {"float16": 1.1 * EPSILON["float16"], "bfloat16": 1.05 * EPSILON["bfloat16"], "float32": 3e-6}


def assert_in_place(b: Backend, got: object, want: object, name: str) -> None:
    """The same bits on a GPU. On the CPU the compiler may contract a b - c d either way, by whether input and output overlap: the same up to one rounding."""
    if b.device == "cuda":
        assert_same_bits(b.numpy(got), b.numpy(want), name)
    else:
        assert_close(b.float64(got), b.float64(want), rtol=2 * EPSILON[b.numpy(got).dtype.name], name=name)


def draw(b: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str):
    return b.array(rng.standard_normal(shape), dtype)


def check(b: Backend, got, x, positions: np.ndarray, freq: np.ndarray, interleave: bool, dtype: str, name: str) -> None:
    want = reference.apply_rope(b.float64(x), positions, freq, interleave)
    assert_close(b.float64(got), want, rtol=RTOL[dtype], name=name)
    rotary = 2 * len(freq)
    assert_same_bits(b.numpy(got)[..., rotary:], b.numpy(x)[..., rotary:], f"{name}, not rotated")


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,rotary_dim",
    [
        (9, 3, 64, None),
        (4, 1, 128, None),
        (32, 8, 128, 64),
        (1, 1, 256, None),
        (3, 2, 80, 20),
        (2, 1, 7, 6),
        (5, 5, 2, None),
        (8, 2, 96, 96),
    ],
)
def test_pos_ids(
    backend_arrays: Backend,
    rng: np.random.Generator,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int | None,
    dtype: str,
    interleave: bool,
) -> None:
    b = backend_arrays
    n = int(rng.integers(1, 9))
    q, k = draw(b, rng, (n, heads, head_dim), dtype), draw(b, rng, (n, kv_heads, head_dim), dtype)
    integer = rng.choice(["int32", "int64"])
    positions = rng.integers(0, 4096, n)
    freq = reference.frequencies(rotary_dim or head_dim, 1e4, 2.0)
    before = b.numpy(q).copy()
    args = (b.array(positions, integer), rotary_dim, interleave, 2.0, 1e4)
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, *args)
    check(b, q_out, q, positions, freq, interleave, dtype, "q")
    check(b, k_out, k, positions, freq, interleave, dtype, "k")
    assert_same_bits(b.numpy(q), before, "q, out of place")
    assert pyinfer.apply_rope_pos_ids_inplace(q, k, *args) is None
    assert_in_place(b, q, q_out, "q in place")
    assert_in_place(b, k, k_out, "k in place")


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_far_positions(backend_arrays: Backend, rng: np.random.Generator, theta: float) -> None:
    """Angles at a million and at 2^31 are as good as at 1. The float32 product position * frequency would be off by up to 0.06 radians at 10^6."""
    b = backend_arrays
    positions = np.concatenate(
        [[0, 1, 100003, 131072, 999999, 1048575, 16777217, 2**31 - 1, -5], rng.integers(100_000, 2_000_000, 23)]
    )
    q, k = draw(b, rng, (32, 2, 128), "float32"), draw(b, rng, (32, 1, 128), "float32")
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, b.array(positions, "int64"), rope_theta=theta)
    # The reference's own float64 product is off by 2^31 * 2^-53 = 2e-7 radians at the farthest position.
    freq = reference.frequencies(128, theta)
    assert_close(b.float64(q_out), reference.apply_rope(b.float64(q), positions, freq), rtol=4e-6)
    assert_close(b.float64(k_out), reference.apply_rope(b.float64(k), positions, freq), rtol=4e-6)


@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("llama31", [False, True])
def test_indptr(backend_arrays: Backend, rng: np.random.Generator, integer: str, llama31: bool) -> None:
    """Requests of 0 to 5 rows with offsets; two rows beyond the last request are copied."""
    b, dtype = backend_arrays, "float16"
    lengths = np.array([3, 0, 1, 5, 0, 0, 2, 4, 0])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    offsets = rng.integers(0, 20000, len(lengths))
    n = indptr[-1] + 2
    positions = np.zeros(n, np.int64)
    for r, length in enumerate(lengths):
        positions[indptr[r] : indptr[r] + length] = offsets[r] + np.arange(length)
    q, k = draw(b, rng, (n, 4, 64), dtype), draw(b, rng, (n, 2, 64), dtype)
    args = (b.array(indptr, integer), b.array(offsets, integer))
    out_of_place, in_place = (
        (pyinfer.apply_llama31_rope, pyinfer.apply_llama31_rope_inplace)
        if llama31
        else (pyinfer.apply_rope, pyinfer.apply_rope_inplace)
    )
    freq = reference.llama31_frequencies(64) if llama31 else reference.frequencies(64)
    q_out, k_out = out_of_place(q, k, *args)
    check(b, q_out, q, positions, freq, False, dtype, "q")
    check(b, k_out, k, positions, freq, False, dtype, "k")
    assert_same_bits(b.numpy(q_out)[-2:], b.numpy(q)[-2:], "rows of no request")
    in_place(q, k, *args)
    assert_in_place(b, q, q_out, "q in place")
    assert_in_place(b, k, k_out, "k in place")


def test_indptr_that_does_not_begin_at_zero(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    q, k = draw(b, rng, (6, 2, 64), "float32"), draw(b, rng, (6, 1, 64), "float32")
    q_out, _ = pyinfer.apply_rope(q, k, b.array([2, 5], "int32"), b.array([10], "int32"))
    check(b, q_out, q, np.array([0, 0, 10, 11, 12, 0]), reference.frequencies(64), False, "float32", "q")
    q_out, _ = pyinfer.apply_rope(q, k, b.array([0], "int32"), b.array(np.zeros(0), "int32"))
    assert_same_bits(b.numpy(q_out), b.numpy(q), "no requests")


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama31(backend_arrays: Backend, rng: np.random.Generator, dtype: str, interleave: bool) -> None:
    b = backend_arrays
    positions = np.concatenate([rng.integers(0, 131072, 6), [0]])
    q, k = draw(b, rng, (7, 4, 128), dtype), draw(b, rng, (7, 2, 128), dtype)
    ids = b.array(positions, "int32")
    q_out, k_out = pyinfer.apply_llama31_rope_pos_ids(q, k, ids, interleave=interleave)
    check(b, q_out, q, positions, reference.llama31_frequencies(128), interleave, dtype, "q")
    check(b, k_out, k, positions, reference.llama31_frequencies(128), interleave, dtype, "k")
    pyinfer.apply_llama31_rope_pos_ids_inplace(q, k, ids, None, interleave, 4, 1e4, 2, 8, 4096)
    # in place the input is gone: compare with a second out-of-place run of the same arguments
    assert not np.array_equal(b.numpy(q), b.numpy(q_out))


def test_llama31_other_factors(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    positions = rng.integers(0, 131072, 5)
    q, k = draw(b, rng, (5, 2, 64), "float32"), draw(b, rng, (5, 2, 64), "float32")
    freq = reference.llama31_frequencies(64, 1e4, 4.0, 2.0, 8.0, 4096)
    q_out, _ = pyinfer.apply_llama31_rope_pos_ids(q, k, b.array(positions, "int64"), None, False, 4, 1e4, 2, 8, 4096)
    check(b, q_out, q, positions, freq, False, "float32", "q")


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,head_size,rotary_dim",
    [(4, 2, 64, 64), (32, 8, 128, 128), (3, 1, 128, 32), (2, 2, 36, 20), (2, 1, 6, 2)],
)
def test_cos_sin_cache(
    backend_arrays: Backend,
    rng: np.random.Generator,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary_dim: int,
    dtype: str,
    is_neox: bool,
) -> None:
    b = backend_arrays
    n = int(rng.integers(1, 9))
    table = rng.standard_normal((50, rotary_dim)).astype(
        np.float32
    )  # any numbers: cos and sin must not be mixed up or recomputed
    positions = rng.integers(0, 50, n)
    positions[0] = 49
    q, k = draw(b, rng, (n, heads * head_size), dtype), draw(b, rng, (n, kv_heads * head_size), dtype)
    args = (head_size, b.array(table), is_neox)
    ids = b.array(positions, rng.choice(["int32", "int64"]))
    q_out, k_out = pyinfer.apply_rope_with_cos_sin_cache(ids, q, k, *args)
    cosine, sine = table[positions, : rotary_dim // 2], table[positions, rotary_dim // 2 :]
    for got, x in ((q_out, q), (k_out, k)):
        assert tuple(got.shape) == tuple(x.shape)
        want = reference.rotate(b.float64(x).reshape(n, -1, head_size), cosine, sine, not is_neox)
        assert_close(b.float64(got).reshape(n, -1, head_size), want, rtol=RTOL[dtype])
    assert pyinfer.apply_rope_with_cos_sin_cache_inplace(ids, q, k, *args) is None
    assert_in_place(b, q, q_out, "query in place")
    assert_in_place(b, k, k_out, "key in place")


@pytest.mark.parametrize("offset,head_dim", [(0, 64), (1, 64), (8, 64), (0, 30)])
def test_strided(backend: Backend, rng: np.random.Generator, offset: int, head_dim: int) -> None:
    """q and k cut out of one qkv tensor, and heads-first tensors seen tokens-first; whatever lies between stays as it was."""
    b, dtype = backend, "float16"
    heads, kv_heads, n = 4, 2, 5
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = draw(b, rng, (n, columns + 16), dtype)
    inner = qkv[:, offset : offset + columns].reshape(n, heads + 2 * kv_heads, head_dim)
    if not np.shares_memory(b.numpy(qkv), b.numpy(inner)) and b.device == "cpu":
        pytest.skip("reshape copied")
    q, k = inner[:, :heads], inner[:, heads : heads + kv_heads]
    positions = rng.integers(0, 1000, n)
    freq = reference.frequencies(head_dim)
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, b.array(positions, "int32"))
    check(b, q_out, q, positions, freq, False, dtype, "q")
    check(b, k_out, k, positions, freq, False, dtype, "k")
    before = b.numpy(qkv).copy()
    pyinfer.apply_rope_pos_ids_inplace(q, k, b.array(positions, "int32"))
    assert_in_place(b, q, q_out, "q in place")
    touched = slice(offset, offset + (heads + kv_heads) * head_dim)
    after = b.numpy(qkv).copy()
    assert not np.array_equal(after[:, touched], before[:, touched])
    after[:, touched] = before[:, touched]
    assert_same_bits(after, before, "outside q and k")
    hnd = draw(b, rng, (heads, n, head_dim), dtype)
    q_out, _ = pyinfer.apply_rope_pos_ids(hnd.swapaxes(0, 1), k, b.array(positions, "int32"))
    check(b, q_out, hnd.swapaxes(0, 1), positions, freq, False, dtype, "heads first")


def test_many_tokens(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """Prefill: one block per token on a GPU, several ranges per thread on the CPU; a token's bits do not depend on the batch."""
    b = backend_arrays
    n = 3000
    q, k = draw(b, rng, (n, 20, 32), "bfloat16"), draw(b, rng, (n, 5, 32), "bfloat16")
    positions = np.arange(n)
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, b.array(positions, "int32"), 16)
    check(b, q_out, q, positions, reference.frequencies(16), False, "bfloat16", "q")
    check(b, k_out, k, positions, reference.frequencies(16), False, "bfloat16", "k")
    q_few, _ = pyinfer.apply_rope_pos_ids(q[5:7], k[5:7], b.array(positions[5:7], "int32"), 16)
    assert_same_bits(b.numpy(q_few), b.numpy(q_out)[5:7], "two tokens alone")


def test_empty(backend: Backend) -> None:
    b = backend
    q, k = b.full((0, 4, 64), 0.0, "float16"), b.full((0, 2, 64), 0.0, "float16")
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, b.array(np.zeros(0), "int32"))
    assert tuple(q_out.shape) == (0, 4, 64) and tuple(k_out.shape) == (0, 2, 64) and b.is_own(q_out)
    pyinfer.apply_rope_inplace(q, k, b.array([0], "int32"), b.array(np.zeros(0), "int32"))


def test_errors(backend: Backend) -> None:
    b = backend
    q, k, ids = b.full((3, 4, 64), 1.0, "float16"), b.full((3, 2, 64), 1.0, "float16"), b.array([0, 1, 2], "int32")
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: rotary_dim .*got 65"):
        pyinfer.apply_rope_pos_ids(q, k, ids, 65)
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: rotary_dim .*got 128"):
        pyinfer.apply_rope_pos_ids(q, k, ids, 128)
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: k .*rows"):
        pyinfer.apply_rope_pos_ids(q, k[:2], ids)
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: k .*head_dim"):
        pyinfer.apply_rope_pos_ids(q, k[..., :32], ids)
    with pytest.raises(TypeError, match=r"apply_rope_pos_ids: k differs in dtype"):
        pyinfer.apply_rope_pos_ids(q, b.full((3, 2, 64), 1.0, "float32"), ids)
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: pos_ids .*\(2,\)"):
        pyinfer.apply_rope_pos_ids(q, k, ids[:2])
    with pytest.raises(TypeError, match=r"apply_rope_pos_ids: pos_ids .*float32"):
        pyinfer.apply_rope_pos_ids(q, k, b.array([0, 1, 2], "float32"))
    with pytest.raises(ValueError, match=r"apply_rope_pos_ids: rope_scale"):
        pyinfer.apply_rope_pos_ids(q, k, ids, rope_scale=0)
    with pytest.raises(ValueError, match=r"apply_rope: offsets .*shape"):
        pyinfer.apply_rope(q, k, ids, ids)
    with pytest.raises(ValueError, match=r"apply_llama31_rope_pos_ids: high_freq_factor"):
        pyinfer.apply_llama31_rope_pos_ids(q, k, ids, low_freq_factor=4)
    flat_q, flat_k = q.reshape(3, 256), k.reshape(3, 128)
    for dtype in ("float16", "float64"):
        with pytest.raises(ValueError, match=rf"apply_rope_with_cos_sin_cache: cos_sin_cache .*{dtype}.*float32"):
            pyinfer.apply_rope_with_cos_sin_cache(ids, flat_q, flat_k, 64, b.full((8, 64), 1.0, dtype))
    with pytest.raises(ValueError, match=r"does not divide into heads"):
        pyinfer.apply_rope_with_cos_sin_cache(ids, flat_q, flat_k, 60, b.full((8, 60), 1.0, "float32"))
    if b.device == "cpu":
        with pytest.raises(ValueError, match=r"apply_rope: indptr is not monotone"):
            pyinfer.apply_rope(q, k, b.array([0, 3, 2], "int32"), b.array([0, 0], "int32"))
        with pytest.raises(ValueError, match=r"positions lies outside cos_sin_cache: got 2, wanted 0 to 1"):
            pyinfer.apply_rope_with_cos_sin_cache(ids, flat_q, flat_k, 64, b.full((2, 64), 1.0, "float32"))


@pytest.mark.gpu
def test_position_outside_the_cache_is_visible(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    q, k = draw(b, rng, (3, 128), "float16"), draw(b, rng, (3, 64), "float16")
    q_out, _ = pyinfer.apply_rope_with_cos_sin_cache(
        b.array([1, 9, -1], "int64"), q, k, 64, b.full((4, 64), 1.0, "float32")
    )
    assert np.isnan(b.float64(q_out)).all(axis=1).tolist() == [False, True, True]


def test_frequency_table_is_exact() -> None:
    """Against integer arithmetic with 200 bits more than needed, for a frequency that is a power of two and for whole turns."""
    from pyinfer.jit.rope import frequency_table

    table = frequency_table(4, 1.0, 2.0**40)  # f = 1 and 2^-20 radians
    two_pi = 6283185307179586476925286766559005768394
    want = [10**39 * 2**64 // two_pi, 10**39 * 2**44 // two_pi]
    assert [abs(int(t) - w) for t, w in zip(table, want, strict=True)] == pytest.approx([0, 0], abs=2**11)
    assert abs(int(frequency_table(2, 0.5, 1e4)[0]) - 2 * want[0]) <= 2**12
    with pytest.raises(ValueError):
        table[0] = 1


@pytest.mark.compile
def test_rope_config() -> None:
    """The blocks of a token have all its heads, in parts of equal size."""
    from pyinfer.jit.rope import rope_config

    for slots in (1, 3, 8, 16, 64, 256):
        for heads in (1, 2, 7, 12, 40, 128, 129):
            for tokens in (1, 4096):
                c = rope_config(slots, heads, tokens)
                assert 1 <= c.heads <= heads and (c.heads == 1 or slots * c.heads <= 128) and 1 <= c.unroll <= 4
                assert c.unroll == 1 or tokens > 1
                parts = -(-heads // (c.heads * c.unroll))
                assert parts * c.heads * c.unroll - heads < parts * c.unroll
