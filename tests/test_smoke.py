"""The smoke set: every operator once, small, on NumPy or CuPy arrays, against float64 NumPy.

It also runs against the installed wheel outside the source tree, without torch, and under compute-sanitizer on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import Backend, assert_close

pytestmark = pytest.mark.smoke

PAGE, HQ, HKV, D = 16, 6, 2, 64
RTOL = 4e-3  # fp16 results: a few roundings of 2^-11


@pytest.fixture
def be(device) -> Backend:
    return Backend("cupy" if device == "cuda" else "numpy", device)


@pytest.fixture
def half(be, rng):
    """half(*shape): normal numbers, rounded to fp16, as (tensor, float64 values)."""

    def make(*shape):
        values = rng.standard_normal(shape).astype(np.float16)
        return be.array(values), values.astype(np.float64)

    return make


def _i32(be: Backend, values) -> object:
    return be.array(np.asarray(values, np.int32))


def _attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(D)) v for one request in float64, and the base-2 LSE. q [m, HQ, D], k and v [n, HKV, D]."""
    k, v = (np.repeat(t, HQ // HKV, axis=1) for t in (k, v))
    s = np.einsum("mhd,nhd->hmn", q, k) / np.sqrt(D)
    if causal:
        m, n = s.shape[1:]
        s[:, np.arange(n)[None] > n - m + np.arange(m)[:, None]] = -np.inf
    top = s.max(axis=2, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=2, keepdims=True)
    lse = (top + np.log(total))[..., 0] / np.log(2)
    return np.einsum("hmn,nhd->mhd", p / total, v), lse.T


@pytest.fixture
def cache(be, half, rng):
    """Three requests of 37, 16 and 5 tokens on shuffled pages: page table on the host and the device, cache, float64 keys and values."""
    kv_len = np.array([37, 16, 5])
    pages = -(-kv_len // PAGE)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(8)[: indptr[-1]].astype(np.int32)
    last = (kv_len - (pages - 1) * PAGE).astype(np.int32)
    (k, k64), (v, v64) = half(58, HKV, D), half(58, HKV, D)
    rows = np.concatenate([[0], np.cumsum(kv_len)]).astype(np.int32)
    paged = be.full((8, 2, PAGE, HKV, D), np.nan, "float16")  # what no token was written to must not be read
    batch, positions = pyinfer.get_batch_indices_positions(
        _i32(be, rows), pyinfer.get_seq_lens(_i32(be, indptr), _i32(be, last), PAGE), 58
    )
    table = (_i32(be, indices), _i32(be, indptr), _i32(be, last))
    pyinfer.append_paged_kv_cache(k, v, batch, positions, paged, *table)
    return paged, (indptr, indices, last), rows, k64, v64


def test_norm(be, half):
    (x, x64), (r, r64), (w, w64) = half(5, 500), half(5, 500), half(500)

    def norm(t, weight):
        return t / np.sqrt((t * t).mean(axis=1, keepdims=True) + 1e-6) * weight

    assert_close(be.float64(pyinfer.rmsnorm(x, w)), norm(x64, w64), rtol=RTOL)
    assert_close(be.float64(pyinfer.gemma_rmsnorm(x, w)), norm(x64, 1 + w64), rtol=RTOL)
    pyinfer.fused_add_rmsnorm(x, r, w)
    assert_close(be.float64(r), x64 + r64, rtol=RTOL)
    assert_close(be.float64(x), norm(x64 + r64, w64), rtol=RTOL)


def test_activation(be, half):
    from math import erf

    x, x64 = half(5, 2 * 96)
    a, b = x64[:, :96], x64[:, 96:]
    assert_close(be.float64(pyinfer.silu_and_mul(x)), a / (1 + np.exp(-a)) * b, rtol=RTOL)
    exact = 0.5 * a * (1 + np.vectorize(erf)(a / np.sqrt(2)))
    assert_close(be.float64(pyinfer.gelu_and_mul(x)), exact * b, rtol=RTOL)
    approximate = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    assert_close(be.float64(pyinfer.gelu_tanh_and_mul(x)), approximate * b, rtol=RTOL)


def test_rope(be, half):
    (q, q64), (k, k64) = half(3, HQ, D), half(3, HKV, D)
    positions = np.array([0, 5, 999])
    q_out, k_out = pyinfer.apply_rope_pos_ids(q, k, _i32(be, positions))
    angle = positions[:, None] * 1e4 ** (-2 * np.arange(D // 2) / D)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    for out, x in ((q_out, q64), (k_out, k64)):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        assert_close(be.float64(out), np.concatenate([a * c - b * s, b * c + a * s], axis=-1), rtol=RTOL)


def test_append(be, cache):
    paged, (indptr, indices, _), rows, k64, v64 = cache
    got = be.float64(paged)
    for b in range(3):
        for position in range(rows[b + 1] - rows[b]):
            page = indices[indptr[b] + position // PAGE]
            np.testing.assert_array_equal(got[page, 0, position % PAGE], k64[rows[b] + position])
            np.testing.assert_array_equal(got[page, 1, position % PAGE], v64[rows[b] + position])
    assert np.isnan(got).sum() == (8 * PAGE - 58) * 2 * HKV * D


def test_decode(be, half, cache):
    paged, (indptr, indices, last), rows, k64, v64 = cache
    q, q64 = half(3, HQ, D)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(be.array(np.zeros(1 << 20, np.uint8)), "NHD")
    wrapper.plan(indptr, indices, last, HQ, HKV, D, PAGE, q_data_type="float16")
    out, lse = wrapper.run(q, paged, return_lse=True)
    for b in range(3):
        own = slice(rows[b], rows[b + 1])
        want, want_lse = _attention(q64[b : b + 1], k64[own], v64[own])
        assert_close(be.float64(out)[b : b + 1], want, rtol=RTOL)
        assert_close(be.float64(lse)[b : b + 1], want_lse, rtol=1e-3)


def test_prefill(be, half, cache):
    paged, (indptr, indices, last), rows, k64, v64 = cache
    qo = np.array([0, 9, 25, 30], np.int32)
    q, q64 = half(30, HQ, D)
    workspace = be.array(np.zeros(1 << 20, np.uint8))
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(qo, indptr, indices, last, HQ, HKV, D, PAGE, causal=True, q_data_type="float16")
    ragged = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    ragged.plan(qo, rows, HQ, HKV, D, causal=True, q_data_type="float16")
    k, v = be.array(k64, "float16"), be.array(v64, "float16")
    for out in (wrapper.run(q, paged), ragged.run(q, k, v)):
        for b in range(3):
            mine, own = slice(qo[b], qo[b + 1]), slice(rows[b], rows[b + 1])
            assert_close(be.float64(out)[mine], _attention(q64[mine], k64[own], v64[own], causal=True)[0], rtol=RTOL)


def test_single(be, half):
    (q, q64), (k, k64), (v, v64) = half(7, HQ, D), half(33, HKV, D), half(33, HKV, D)
    out = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    assert_close(be.float64(out), _attention(q64, k64, v64, causal=True)[0], rtol=RTOL)
    out = pyinfer.single_decode_with_kv_cache(q[0], k, v)
    assert_close(be.float64(out)[None], _attention(q64[:1], k64, v64)[0], rtol=RTOL)


def test_cascade(be, half, rng):
    (a, a64), (b, b64) = half(4, HQ, D), half(4, HQ, D)
    s = rng.standard_normal((2, 4, HQ)).astype(np.float32)
    s[:, 0, 0] = -np.inf
    w = np.exp2(s.astype(np.float64))
    total = w.sum(axis=0)
    weight = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
    want = weight[0][..., None] * a64 + weight[1][..., None] * b64
    with np.errstate(divide="ignore"):
        want_lse = np.log2(total)
    out, lse = pyinfer.merge_state(a, be.array(s[0]), b, be.array(s[1]))
    assert_close(be.float64(out), want, rtol=RTOL)
    assert_close(be.float64(lse), want_lse, rtol=1e-5)
    stacked = be.array(np.stack([a64, b64], axis=1), "float16")
    out, lse = pyinfer.merge_states(stacked, be.array(np.stack([s[0], s[1]], axis=1)))
    assert_close(be.float64(out), want, rtol=RTOL)
    pyinfer.merge_state_in_place(a, be.array(s[0]), b, be.array(s[1]))
    assert_close(be.float64(a), want, rtol=RTOL)


def test_sampling(be, rng):
    logits = rng.standard_normal((8, 333)).astype(np.float32) * 2
    p64 = np.exp(logits.astype(np.float64))
    p64 /= p64.sum(axis=1, keepdims=True)
    probs = pyinfer.softmax(be.array(logits))
    assert_close(be.float64(probs), p64, rtol=1e-5)
    rank = (p64[:, None, :] > p64[:, :, None]).sum(axis=2)  # how many tokens are likelier
    above = (p64[:, None, :] * (p64[:, None, :] > p64[:, :, None])).sum(axis=2)  # and their probability in all
    rows = np.arange(8)

    def ids(sampled):
        got = be.numpy(sampled)
        assert got.dtype == np.int32 and got.shape == (8,) and got.min() >= 0 and got.max() < 333
        return got

    ids(pyinfer.sampling_from_logits(be.array(logits)))
    ids(pyinfer.sampling_from_probs(probs))
    assert (rank[rows, ids(pyinfer.top_k_sampling_from_probs(probs, 5))] < 5).all()
    assert (above[rows, ids(pyinfer.top_p_sampling_from_probs(probs, 0.3))] < 0.3 + 1e-4).all()
    both = ids(pyinfer.top_k_top_p_sampling_from_probs(probs, 5, 0.9, filter_apply_order="joint"))
    assert (rank[rows, both] < 5).all() and (above[rows, both] < 0.9 + 1e-4).all()
    assert (p64[rows, ids(pyinfer.min_p_sampling_from_probs(probs, 0.2))] > 0.2 * p64.max(axis=1) - 1e-6).all()
    assert (ids(pyinfer.top_k_sampling_from_probs(probs, 1)) == p64.argmax(axis=1)).all()


def test_errors_come_before_any_launch(half):
    (x, _), (w, _) = half(2, 64), half(63)
    with pytest.raises(ValueError, match=r"rmsnorm: weight .*got .*63.*wanted .*64"):
        pyinfer.rmsnorm(x, w)


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
def test_one_kernel_of_every_family_compiles(arch, tmp_path, monkeypatch):
    """Templates and headers are all there in a wheel, and NVRTC takes them."""
    from pyinfer._cli import select
    from pyinfer.jit import env

    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(tmp_path))
    for family, every in select.all_specs().items():
        specs = [s for s in every if s.suits(env.arch_number(arch))]
        for template in {s.template for s in specs}:
            artifact = next(s for s in specs if s.template == template).build(arch)
            assert artifact.resources.registers > 0, family
