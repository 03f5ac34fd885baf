"""Prefill and append attention against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer._support import KERNEL_FAMILIES
from pyinfer.prefill import single_prefill_with_kv_cache_return_lse
from tests import attention_cases as cases
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.attention_cases import Shape
from tests.reference.attention import attention

COUNT = 18


def indptr_of(lens) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def make_wrapper(shape: Shape, paged: cases.Paged, **plan) -> pyinfer.BatchPrefillWithPagedKVCacheWrapper:
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, shape.layout)
    wrapper.plan(
        indptr_of(shape.qo_lens), paged.indptr, paged.indices, paged.last_page_len, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim,
        shape.page_size, q_data_type=shape.dtype, **{**shape.options, **plan},
    )  # fmt: skip
    return wrapper


def draw(rng: np.random.Generator, backend: Backend, dtype: str, *dims: int):
    x = backend.array(rng.standard_normal(dims), dtype)
    return x, backend.float64(x)


@pytest.mark.parametrize("i", range(COUNT))
def test_batch_prefill_paged(rng, backend, device, i):
    shape = cases.shapes(device, 2, COUNT, prefill=True)[i]
    paged = cases.paged_cache(rng, backend, shape)
    q, q64 = draw(rng, backend, shape.dtype, sum(shape.qo_lens), shape.num_qo_heads, shape.head_dim)
    out = backend.full(q64.shape, np.nan, shape.dtype)
    lse = backend.full(q64.shape[:2], np.nan, "float32")
    wrapper = make_wrapper(shape, paged)
    got = wrapper.run(q, paged.cache, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    want, want_lse = cases.expected(q64, shape.qo_lens, paged.k, paged.v, **shape.options)
    assert_close(backend.float64(out), want, **cases.tolerance(shape.dtype, device), name=str(shape))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name=f"lse of {shape}")
    blind = want_lse == -np.inf
    assert (backend.float64(out)[blind] == 0).all()
    assert_same_bits(backend.numpy(wrapper.run(q, paged.cache)), backend.numpy(out), "second run")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_left": 33, "logits_soft_cap": 4.0}], ids=str
)
def test_batch_prefill_ragged(rng, backend, device, layout, options):
    for dtype, (hq, hk, d) in zip(cases.dtypes(device), ((6, 2, 64), (7, 1, 128), (4, 4, 256)), strict=False):
        qo_lens, kv_lens = (5, 0, 40, 1, 130, 3), (5, 9, 40, 0, 300, 200)
        q, q64 = draw(rng, backend, dtype, sum(qo_lens), hq, d)
        dims = (sum(kv_lens) + 4, hk, d) if layout == "NHD" else (hk, sum(kv_lens) + 4, d)
        (k, k64), (v, v64) = draw(rng, backend, dtype, *dims), draw(rng, backend, dtype, *dims)
        if layout == "HND":
            k64, v64 = k64.swapaxes(0, 1), v64.swapaxes(0, 1)
        at = indptr_of(kv_lens)
        wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(None, layout)
        wrapper.plan(indptr_of(qo_lens), at, hq, hk, d, q_data_type=dtype, **options)
        out, lse = wrapper.run_return_lse(q, k, v)
        batch = range(len(qo_lens))
        want, want_lse = cases.expected(
            q64, qo_lens, [k64[at[b] : at[b + 1]] for b in batch], [v64[at[b] : at[b + 1]] for b in batch], **options
        )
        assert_close(backend.float64(out), want, **cases.tolerance(dtype, device))
        assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device))


@pytest.mark.parametrize("qo_len,kv_len", [(1, 1), (1, 500), (7, 3), (64, 64), (33, 300), (300, 300), (200, 129)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_left": 0}, {"window_left": 50}], ids=str
)
def test_single_prefill(rng, backend_arrays, device, qo_len, kv_len, options):
    b = backend_arrays
    dtype = str(rng.choice(cases.dtypes(device)))
    hk, group = [(1, 7), (2, 3), (3, 1), (1, 8), (2, 4)][int(rng.integers(5))]
    (q, q64), (k, k64), (v, v64) = (
        draw(rng, b, dtype, *s) for s in ((qo_len, hk * group, 64), (kv_len, hk, 64), (kv_len, hk, 64))
    )
    out, lse = single_prefill_with_kv_cache_return_lse(q, k, v, **options)
    want, want_lse = attention(q64, k64, v64, **options)
    assert b.is_own(out) and b.is_own(lse)
    assert_close(b.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(b.float64(lse), want_lse, **cases.lse_tolerance(device))
    hnd = pyinfer.single_prefill_with_kv_cache(q, k.transpose(0, 1), v.transpose(0, 1), kv_layout="HND", **options)
    assert_same_bits(b.numpy(hnd), b.numpy(out), "HND")


def test_single_prefill_positional_scales(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    (q, q64), (k, k64), (v, v64) = (draw(rng, b, dtype, *s) for s in ((9, 4, 64), (20, 2, 64), (20, 2, 64)))
    got = pyinfer.single_prefill_with_kv_cache(q, k, v, 2.0, 0.5, 0.25, None, None, None, True)
    want, _ = attention(q64, k64, v64, causal=True, v_scale=0.25)
    assert_close(b.float64(got), want, **cases.tolerance(dtype, device))


@pytest.mark.cpu
@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (80, 80), (3, 5), (1, 1)], ids=str)
def test_unequal_and_odd_head_dims(rng, backend_arrays, dims):
    b = backend_arrays
    for rows in (1, 70):
        (q, q64), (k, k64), (v, v64) = (
            draw(rng, b, "float32", *s) for s in ((rows, 4, dims[0]), (150, 2, dims[0]), (150, 2, dims[1]))
        )
        got = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
        assert_close(b.float64(got), attention(q64, k64, v64, causal=True)[0], rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("plan", [{}, {"fixed_split_size": 2}, {"disable_split_kv": True}], ids=str)
def test_split_kv(rng, backend_arrays, device, plan, monkeypatch):
    if device == "cpu":
        from pyinfer.cpu import threads

        monkeypatch.setattr(threads, "_num_threads", 9)
    for dtype in cases.dtypes(device):
        shape = Shape(
            dtype, 3, 1, 64, lens=(1200, 40), qo_lens=(50, 2), options={"causal": True, "logits_soft_cap": 6.0}
        )
        paged = cases.paged_cache(rng, backend_arrays, shape)
        q, q64 = draw(rng, backend_arrays, dtype, 52, 3, 64)
        wrapper = make_wrapper(shape, paged, **plan)
        assert (wrapper.plan_info.num_partials > 0) == ("disable_split_kv" not in plan)
        out, lse = wrapper.run(q, paged.cache, q_scale=0.5, k_scale=2.0, v_scale=2.0, return_lse=True)
        want, want_lse = cases.expected(q64, shape.qo_lens, paged.k, paged.v, v_scale=2.0, **shape.options)
        assert_close(backend_arrays.float64(out), want, **cases.tolerance(dtype, device))
        assert_close(backend_arrays.float64(lse), want_lse, **cases.lse_tolerance(device))


@pytest.mark.parametrize("plan", [{"fixed_split_size": 3}, {"disable_split_kv": True}], ids=str)
def test_batched_equals_one_by_one(rng, backend_arrays, device, plan):
    b = backend_arrays
    shape = Shape(
        cases.dtypes(device)[0], 6, 2, 64, lens=(300, 1, 33, 0, 128), qo_lens=(90, 1, 2, 3, 1), options={"causal": True}
    )
    paged = cases.paged_cache(rng, b, shape)
    q, _ = draw(rng, b, shape.dtype, sum(shape.qo_lens), 6, 64)
    together = b.numpy(make_wrapper(shape, paged, **plan).run(q, paged.cache))
    at = indptr_of(shape.qo_lens)
    for i, n in enumerate(shape.qo_lens):
        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
        pages = paged.indices[paged.indptr[i] : paged.indptr[i + 1]]
        wrapper.plan(
            [0, n],
            [0, len(pages)],
            pages,
            paged.last_page_len[i : i + 1],
            6,
            2,
            64,
            16,
            causal=True,
            q_data_type=shape.dtype,
            **plan,
        )
        assert_same_bits(
            b.numpy(wrapper.run(q[at[i] : at[i + 1]], paged.cache)), together[at[i] : at[i + 1]], f"request {i}"
        )


def test_prefill_of_one_row_is_decode(rng, backend_arrays, device):
    b = backend_arrays
    shape = Shape(cases.dtypes(device)[0], 8, 2, 128, lens=(77, 16, 1), qo_lens=(1, 1, 1), options={"causal": True})
    paged = cases.paged_cache(rng, b, shape)
    q, _ = draw(rng, b, shape.dtype, 3, 8, 128)
    decode = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    decode.plan(paged.indptr, paged.indices, paged.last_page_len, 8, 2, 128, 16, q_data_type=shape.dtype)
    assert_same_bits(b.numpy(make_wrapper(shape, paged).run(q, paged.cache)), b.numpy(decode.run(q, paged.cache)))


def test_strided(rng, backend, device):
    dtype = cases.dtypes(device)[0]
    q, k, v = (
        cases.strided(backend, rng.standard_normal(s), dtype, rng) for s in ((40, 6, 64), (90, 2, 64), (90, 2, 64))
    )
    got = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    want, _ = attention(*(backend.float64(x) for x in (q, k, v)), causal=True)
    assert_close(backend.float64(got), want, **cases.tolerance(dtype, device))


@pytest.mark.cpu
def test_negative_and_zero_strides(rng):
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((40, 6, 64), (90, 2, 64), (90, 1, 64)))
    v = np.broadcast_to(v, (90, 2, 64))
    got = pyinfer.single_prefill_with_kv_cache(q[::-1], k[::-2], v[::2], causal=True)
    assert_close(got, attention(q[::-1], k[::-2], v[::2], causal=True)[0], rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_scores(rng, backend_arrays, device, sign):
    b, dtype = backend_arrays, "bfloat16"
    q = np.full((70, 2, 64), 1e15)
    k = sign * np.linspace(0.5, 1.0, 170)[:, None, None] * np.full((170, 1, 64), 1e15)
    q, k, v = (b.array(x, dtype) for x in (q, k, rng.standard_normal((170, 1, 64))))
    out, lse = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    want, want_lse = attention(b.float64(q), b.float64(k), b.float64(v), causal=True)
    assert_close(b.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(b.float64(lse), want_lse, rtol=1e-5)


def test_infinite_scores(rng, backend_arrays, device):
    b = backend_arrays
    q = np.zeros((60, 1, 64))
    q[:, 0, 0] = 1e25
    k = np.zeros((60, 1, 64))
    k[:, 0, 0] = [-1e25] + 58 * [0] + [1e25]  # row 0 sees -inf alone, the last row one +inf
    q, k, v = (b.array(x, "bfloat16") for x in (q, k, rng.standard_normal((60, 1, 64))))
    out, lse = (b.float64(x) for x in pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True))
    assert (out[0] == 0).all() and lse[0, 0] == -np.inf
    assert np.isfinite(out).all()
    assert_close(out[59, 0], b.float64(v)[59, 0], rtol=1e-6)
    assert_close(lse[1:59, 0], np.log2(np.arange(1, 59)), rtol=0, atol=1e-3)


def test_forward_replaces_the_plans_mask(rng, backend_arrays, device):
    b = backend_arrays
    shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=(60, 33), qo_lens=(40, 33), options={})
    paged = cases.paged_cache(rng, b, shape)
    q, q64 = draw(rng, b, shape.dtype, 73, 4, 64)
    wrapper = make_wrapper(shape, paged)
    with pytest.warns(DeprecationWarning, match=r"forward is deprecated; use run"):
        got = wrapper.forward(q, paged.cache, True, window_left=9, v_scale=2.0)
    want, _ = cases.expected(q64, shape.qo_lens, paged.k, paged.v, causal=True, window_left=9, v_scale=2.0)
    assert_close(b.float64(got), want, **cases.tolerance(shape.dtype, device))


def graph_wrapper(b: Backend, batch: int, pages: int):
    buffers = [b.array(np.full(n, -7), "int32") for n in (batch + 1, batch + 1, pages, batch)]
    return pyinfer.BatchPrefillWithPagedKVCacheWrapper(
        b.array(np.zeros(64 << 20, np.uint8)), "NHD", True, *buffers
    ), buffers


def test_graph_mode_plans_stay_in_their_buffers(rng, backend_arrays, device):
    b = backend_arrays
    wrapper, buffers = graph_wrapper(b, 3, 80)
    fixed = None
    for i in range(5):
        qo_lens = (60, 50, 40) if i == 0 else tuple(int(n) for n in rng.integers(0, 50, 3))
        lens = tuple(int(n) for n in rng.integers(0, 300, 3))
        shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=lens, qo_lens=qo_lens, options={"causal": True})
        paged = cases.paged_cache(rng, b, shape)
        wrapper.plan(
            indptr_of(qo_lens),
            paged.indptr,
            paged.indices,
            paged.last_page_len,
            4,
            2,
            64,
            16,
            causal=True,
            q_data_type=shape.dtype,
        )
        plan = wrapper.plan_info
        now = (plan.max_work, plan.max_partials, plan.workspace_bytes, plan.offsets, plan.tile_q)
        assert fixed in (None, now)
        fixed = now
        for buffer, values in zip(
            buffers, (indptr_of(qo_lens), paged.indptr, paged.indices, paged.last_page_len), strict=True
        ):
            assert_same_bits(b.numpy(buffer)[: len(values)], values)
        q, q64 = draw(rng, b, shape.dtype, 150, 4, 64)  # room for more rows than the plan has
        out = b.full((150, 4, 64), np.nan, shape.dtype)
        rows = sum(qo_lens)
        want, _ = cases.expected(q64[:rows], qo_lens, paged.k, paged.v, causal=True)
        wrapper.run(q, paged.cache, out=out)
        assert_close(b.float64(out)[:rows], want, **cases.tolerance(shape.dtype, device))
        assert np.isnan(b.float64(out)[rows:]).all()


@pytest.mark.gpu
def test_cuda_graph_replays_follow_plans(rng, backend_arrays):
    import torch

    b = backend_arrays
    cache = torch.randn(256, 2, 16, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.empty(300, 8, 128, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    (wrapper, _), (eager, _) = graph_wrapper(b, 4, 256), graph_wrapper(b, 4, 256)

    def plan(w, qo_lens, lens):
        indptr, indices, last, _ = cases.page_table(rng, lens, 16, spare=0)
        table = (indptr_of(qo_lens), indptr, rng.permutation(256)[: len(indices)].astype(np.int32), last)
        w.plan(*table, 8, 2, 128, 16, causal=True)
        return table

    first = plan(wrapper, [75] * 4, [100] * 4)
    eager.plan(*first, 8, 2, 128, 16, causal=True)
    wrapper.run(q, cache, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, cache, out=out)
    for i in range(30):
        qo_lens = rng.integers(0, 75, 4)
        table = plan(wrapper, qo_lens, rng.integers(0, 1000, 4))
        eager.plan(*table, 8, 2, 128, 16, causal=True)
        q.copy_(torch.randn_like(q))
        out.fill_(float("nan"))
        graph.replay()
        rows = int(qo_lens.sum())
        assert_same_bits(b.numpy(out)[:rows], b.numpy(eager.run(q, cache))[:rows], f"replay {i}")
        assert np.isnan(b.numpy(out)[rows:]).all()


@pytest.mark.cpu
def test_one_compiled_kernel_serves_every_layout(rng, backend_arrays):
    """First use costs a compile of seconds: paged or ragged, strided, read-only, split, with an LSE or not must not cost another."""
    code = """
import numpy as np, pyinfer
from pyinfer.cpu import decode, prefill, threads
threads.set_num_threads(4)
rng = np.random.default_rng(0)
draw = lambda *s: rng.standard_normal(s).astype(np.float32)
for rows in (1, 60):
    q, k = draw(rows, 4, 64), draw(300, 1, 64)
    pyinfer.single_prefill_with_kv_cache(q, k, k, causal=True, return_lse=True)
    q.flags.writeable = False
    pyinfer.single_prefill_with_kv_cache(q, k[::-1], k, logits_soft_cap=2.0)
    for layout, shape in (("NHD", (20, 2, 16, 1, 64)), ("HND", (20, 2, 1, 16, 64))):
        w = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, layout)
        w.plan([0, rows], [0, 20], np.arange(20), [16], 4, 1, 64, 16, q_data_type="float32")
        w.run(q, draw(*shape), return_lse=layout == "NHD")
for kernel in (decode.decode_items, prefill.prefill_items):
    assert len(kernel.signatures) == 1, kernel.signatures
"""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_of_scales(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    q, k, v = (b.array(rng.standard_normal(s), dtype) for s in ((5, 4, 64), (9, 2, 64), (9, 2, 64)))
    one = pyinfer.single_prefill_with_kv_cache(q, k, v, scale_k=0.5, scale_v=2.0)
    two = pyinfer.single_prefill_with_kv_cache(q, k, v, k_scale=0.5, v_scale=2.0)
    assert_same_bits(b.numpy(one), b.numpy(two))
    assert not (b.numpy(one) == b.numpy(pyinfer.single_prefill_with_kv_cache(q, k, v))).all()


@pytest.mark.parametrize("backend", ["auto", "fa2"])
def test_equal_options_are_looked_up(backend):
    """Also where `backend` names a family: the second plan takes the short way, which needs the very key of the first."""
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(None, backend=backend)
    indptr = np.array([0, 3, 8], np.int32)
    keys = []
    for _ in range(2):
        wrapper.plan(indptr, indptr, 4, 2, 64, causal=True, q_data_type="float32")
        keys.append(wrapper._plan_key)
    assert keys[0] is keys[1] and keys[0].family == KERNEL_FAMILIES[backend]
    assert wrapper.plan_info.causal and wrapper.plan_info.kv_len.tolist() == [3, 5]
