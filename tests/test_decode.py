"""Decode attention against the float64 reference."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import pyinfer
from pyinfer.decode import CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from tests import attention_cases as cases
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.attention_cases import Shape
from tests.reference.attention import attention

COUNT = 18


def make_wrapper(shape: Shape, paged: cases.Paged, **plan) -> pyinfer.BatchDecodeWithPagedKVCacheWrapper:
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, shape.layout)
    options = {**shape.options, **plan}
    wrapper.plan(
        paged.indptr, paged.indices, paged.last_page_len, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, shape.page_size,
        q_data_type=shape.dtype, **options,
    )  # fmt: skip
    return wrapper


def draw_q(rng: np.random.Generator, backend: Backend, shape: Shape, rows: int):
    q = backend.array(rng.standard_normal((rows, shape.num_qo_heads, shape.head_dim)), shape.dtype)
    return q, backend.float64(q)


def reference(q64: np.ndarray, paged: cases.Paged, shape: Shape, **extra):
    # A decode query stands at the last key, so that "visible" needs no causal mask.
    return cases.expected(q64, shape.qo_lens, paged.k, paged.v, **{**shape.options, **extra})


@pytest.mark.parametrize("i", range(COUNT))
def test_batch_decode(rng, backend, device, i):
    shape = cases.shapes(device, 1, COUNT, prefill=False)[i]
    shape.qo_lens = (1,) * len(shape.lens)
    paged = cases.paged_cache(rng, backend, shape)
    q, q64 = draw_q(rng, backend, shape, len(shape.lens))
    out = backend.full(q64.shape, np.nan, shape.dtype)
    lse = backend.full(q64.shape[:2], np.nan, "float32")
    wrapper = make_wrapper(shape, paged)
    got = wrapper.run(q, paged.cache, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    want, want_lse = reference(q64, paged, shape)
    assert_close(backend.float64(out), want, **cases.tolerance(shape.dtype, device), name=str(shape))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name=f"lse of {shape}")
    empty = np.asarray(shape.lens) == 0
    assert (backend.float64(out)[empty] == 0).all() and (backend.float64(lse)[empty] == -np.inf).all()
    again = wrapper.run(q, paged.cache)
    assert backend.is_own(again)
    assert_same_bits(backend.numpy(again), backend.numpy(out), "second run")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_len", [0, 1, 33, 700])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_single_decode(rng, backend, device, layout, kv_len, group):
    dtype = str(rng.choice(cases.dtypes(device)))
    dims = (kv_len, 2, 64) if layout == "NHD" else (2, kv_len, 64)
    q, k, v = (backend.array(rng.standard_normal(s), dtype) for s in ((2 * group, 64), dims, dims))
    out, lse = pyinfer.single_decode_with_kv_cache(q, k, v, layout, return_lse=True)
    k64, v64 = (backend.float64(x) if layout == "NHD" else backend.float64(x).swapaxes(0, 1) for x in (k, v))
    want, want_lse = attention(backend.float64(q)[None], k64, v64)
    assert backend.is_own(out) and backend.is_own(lse)
    assert_close(backend.float64(out), want[0], **cases.tolerance(dtype, device))
    assert_close(backend.float64(lse), want_lse[0], **cases.lse_tolerance(device))


def test_single_decode_options(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    q, k, v = (b.array(rng.standard_normal(s), dtype) for s in ((6, 128), (90, 2, 128), (90, 2, 128)))
    got = pyinfer.single_decode_with_kv_cache(q, k, v, "NHD", "NONE", True, 0.5, 3.0, 0.25, 20, 4.0, 0.1)
    want, _ = attention(
        b.float64(q)[None], b.float64(k), b.float64(v), window_left=20, logits_soft_cap=4.0, sm_scale=0.15, v_scale=0.25
    )
    assert_close(b.float64(got), want[0], **cases.tolerance(dtype, device))


def test_scales(rng, backend_arrays, device):
    shape = Shape(cases.dtypes(device)[0], 8, 2, 64, options={"logits_soft_cap": 5.0})
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, q64 = draw_q(rng, backend_arrays, shape, 5)
    got = make_wrapper(shape, paged).run(q, paged.cache, q_scale=2.0, k_scale=0.5, v_scale=-3.0)
    want, _ = reference(q64, paged, shape, sm_scale=64**-0.5, v_scale=-3.0)
    assert_close(backend_arrays.float64(got), want, **cases.tolerance(shape.dtype, device))


@pytest.mark.parametrize(
    "plan", [{}, {"fixed_split_size": 2}, {"fixed_split_size": 7}, {"disable_split_kv": True}], ids=str
)
def test_split_kv(rng, backend_arrays, device, plan, monkeypatch):
    if device == "cpu":  # few heads, many threads: what makes a plan split
        from pyinfer.cpu import threads

        monkeypatch.setattr(threads, "_num_threads", 7)
    for dtype in cases.dtypes(device):
        shape = Shape(dtype, 5, 1, 128, lens=(3000, 0, 1, 517, 40), options={"window_left": 2500})
        paged = cases.paged_cache(rng, backend_arrays, shape)
        q, q64 = draw_q(rng, backend_arrays, shape, 5)
        wrapper = make_wrapper(shape, paged, **plan)
        assert (wrapper.plan_info.num_partials > 0) == ("disable_split_kv" not in plan)
        out, lse = wrapper.run(q, paged.cache, v_scale=0.5, return_lse=True)
        want, want_lse = reference(q64, paged, shape, v_scale=0.5)
        assert_close(backend_arrays.float64(out), want, **cases.tolerance(dtype, device))
        assert_close(backend_arrays.float64(lse), want_lse, **cases.lse_tolerance(device))
        assert_same_bits(
            backend_arrays.numpy(wrapper.run(q, paged.cache, v_scale=0.5)), backend_arrays.numpy(out), "second run"
        )


@pytest.mark.parametrize(("heads", "dim"), [((16, 1), 128), ((3, 1), 64)])
def test_more_splits_than_are_merged_at_once(rng, backend_arrays, device, heads, dim):
    """Splits of one page each, beside a request without keys and one of a single split."""
    shape = Shape(cases.dtypes(device)[0], *heads, dim, lens=(2500, 0, 9, 40), qo_lens=(1,) * 4)
    paged = cases.paged_cache(rng, backend_arrays, shape, magnitude=3.0)
    q, q64 = draw_q(rng, backend_arrays, shape, 4)
    wrapper = make_wrapper(shape, paged, fixed_split_size=1)
    assert wrapper.plan_info.num_partials >= 157
    out, lse = wrapper.run(q, paged.cache, return_lse=True)
    want, want_lse = reference(q64, paged, shape)
    assert_close(backend_arrays.float64(out), want, **cases.tolerance(shape.dtype, device))
    assert_close(backend_arrays.float64(lse), want_lse, **cases.lse_tolerance(device))


@pytest.mark.parametrize("plan", [{"fixed_split_size": 3}, {"disable_split_kv": True}], ids=str)
def test_batched_equals_one_by_one(rng, backend_arrays, device, plan):
    shape = Shape(cases.dtypes(device)[0], 6, 2, 64, lens=(300, 1, 33, 0, 128, 47), qo_lens=(1,) * 6)
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, _ = draw_q(rng, backend_arrays, shape, 6)
    together = make_wrapper(shape, paged, **plan).run(q, paged.cache)
    for b in range(6):
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
        pages = paged.indices[paged.indptr[b] : paged.indptr[b + 1]]
        wrapper.plan(
            [0, len(pages)], pages, paged.last_page_len[b : b + 1], 6, 2, 64, 16, q_data_type=shape.dtype, **plan
        )
        alone = wrapper.run(q[b : b + 1], paged.cache)
        assert_same_bits(backend_arrays.numpy(alone), backend_arrays.numpy(together)[b : b + 1], f"request {b}")


def test_strided_q_and_out(rng, backend, device):
    shape = Shape(cases.dtypes(device)[0], 8, 4, 64, form="strided")
    paged = cases.paged_cache(rng, backend, shape)
    values = rng.standard_normal((5, 8, 64))
    q = cases.strided(backend, values, shape.dtype, rng)
    out = cases.strided(backend, np.full_like(values, np.nan), shape.dtype, rng)
    make_wrapper(shape, paged).run(q, paged.cache, out=out)
    want, _ = reference(backend.float64(q), paged, shape)
    assert_close(backend.float64(out), want, **cases.tolerance(shape.dtype, device))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_scores(rng, backend_arrays, device, sign):
    """Scores of +-1e30: the largest wins, nothing overflows to NaN."""
    dtype = "bfloat16"
    q = np.full((2, 64), 1e15)
    k = sign * np.linspace(0.5, 1.0, 40)[:, None, None] * np.full((40, 1, 64), 1e15)
    v = rng.standard_normal((40, 1, 64))
    q, k, v = (backend_arrays.array(x, dtype) for x in (q, k, v))
    out, lse = pyinfer.single_decode_with_kv_cache(q, k, v, return_lse=True)
    want, want_lse = attention(backend_arrays.float64(q)[None], backend_arrays.float64(k), backend_arrays.float64(v))
    assert_close(backend_arrays.float64(out), want[0], **cases.tolerance(dtype, device))
    assert_close(backend_arrays.float64(lse), want_lse[0], rtol=1e-5)


def test_infinite_scores(rng, backend_arrays, device):
    """A score that overflows to +inf counts as the largest float, one of -inf as masked; neither makes a NaN."""
    q = np.zeros((1, 64))
    q[0, 0] = 1e25
    k = np.zeros((5, 1, 64))
    k[:, 0, 0] = [0, -1e25, 1e25, 0, -1e25]
    v = rng.standard_normal((5, 1, 64))
    q, k, v = (backend_arrays.array(x, "bfloat16") for x in (q, k, v))
    out = backend_arrays.float64(pyinfer.single_decode_with_kv_cache(q, k, v))
    assert_close(out[0], backend_arrays.float64(v)[2, 0], rtol=1e-6)
    out, lse = pyinfer.single_decode_with_kv_cache(q, k[1:2], v[1:2], return_lse=True)
    assert (backend_arrays.float64(out) == 0).all() and (backend_arrays.float64(lse) == -np.inf).all()


def test_metadata_forms(rng, backend_arrays, device):
    """Lists, NumPy of another width, tensors on the CPU and on the device: one result."""
    import torch

    shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=(20, 33))
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, _ = draw_q(rng, backend_arrays, shape, 2)
    results = []
    table = (paged.indptr, paged.indices, paged.last_page_len)
    for convert in (
        lambda x: x,
        lambda x: x.tolist(),
        lambda x: x.astype(np.int64),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).to(device),
    ):
        for workspace in (None, backend_arrays.array(np.zeros(1 << 24, np.uint8))):
            wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(*map(convert, table), 4, 2, 64, 16, "NONE", -1, None, getattr(torch, shape.dtype))
            results.append(backend_arrays.numpy(wrapper.run(q, paged.cache)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_plan_copies_metadata(rng, backend_arrays, device):
    shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=(20, 33), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, q64 = draw_q(rng, backend_arrays, shape, 2)
    wrapper = make_wrapper(shape, paged)
    paged.indices[:] = 0
    want, _ = reference(q64, paged, shape)
    assert_close(backend_arrays.float64(wrapper.run(q, paged.cache)), want, **cases.tolerance(shape.dtype, device))


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_a_moved_plan_is_of_the_metadata_that_plan_saw(rng, monkeypatch, kind):
    """Without a workspace the plan is made for the CPU and made again for the GPU that q shows: not from the caller's arrays, which may have changed."""
    from pyinfer import _attention, _batch_attention
    from pyinfer.core.tensor import TensorView, view

    lens, qo_lens = [20, 33, 0], [1, 1, 1] if kind == "decode" else [2, 5, 0]
    table = cases.page_table(rng, lens, 16, spare=0)[:3]
    qo_indptr = np.cumsum([0, *qo_lens]).astype(np.int32)
    if kind == "ragged":
        given = (qo_indptr, np.cumsum([0, *lens]).astype(np.int32))
        wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
        wrapper.plan(*given, 4, 2, 64, causal=True)
    elif kind == "paged":
        given = (qo_indptr, *table)
        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
        wrapper.plan(*given, 4, 2, 64, 16, causal=True)
    else:
        given = table
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
        wrapper.plan(*given, 4, 2, 64, 16)
    here = wrapper.plan_info
    for array in given:
        array[:] = 0
    monkeypatch.setattr(_attention, "batch_tiles", lambda *args: (16, 32, 100, 2))
    monkeypatch.setattr(_batch_attention.BatchAttention, "_upload", lambda self, plan: None)
    q = view(np.zeros((sum(qo_lens), 4, 64), np.float16))
    wrapper._move_plan(TensorView(None, 0, q.shape, q.strides, q.dtype, 0, "torch"))
    there = wrapper.plan_info
    assert there is not here and there.tile_q == 16
    for name in ("qo_indptr", "kv_indptr", "kv_len", "kv_indices"):
        if getattr(here, name) is not None:
            assert_same_bits(getattr(there, name), getattr(here, name), name)
    assert there.kv_len.tolist() == lens
    assert (there.kv_indices is None) == (kind == "ragged")
    assert (there.max_page, there.causal, there.window_left) == (here.max_page, here.causal, here.window_left)


def test_deprecated_names_warn_and_work(rng, backend_arrays, device):
    shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=(20, 33), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, q64 = draw_q(rng, backend_arrays, shape, 2)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    with pytest.warns(DeprecationWarning, match=r"begin_forward is deprecated; use plan"):
        wrapper.begin_forward(paged.indptr, paged.indices, paged.last_page_len, 4, 2, 64, 16, data_type=shape.dtype)
    with pytest.warns(DeprecationWarning, match=r"forward is deprecated; use run"):
        got, lse = wrapper.forward_return_lse(q, paged.cache, window_left=5, logits_soft_cap=2.0, sm_scale=0.5)
    want, want_lse = reference(q64, paged, shape, window_left=5, logits_soft_cap=2.0, sm_scale=0.5)
    assert_close(backend_arrays.float64(got), want, **cases.tolerance(shape.dtype, device))
    assert_close(backend_arrays.float64(lse), want_lse, **cases.lse_tolerance(device))
    with pytest.warns(DeprecationWarning):
        wrapper.end_forward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.run_return_lse(q, paged.cache)


def test_plans_of_the_same_options(rng, backend_arrays, device):
    """A plan that differs from the last in its batch alone takes a short way, which forward()'s overrides must not survive."""
    b = backend_arrays
    dtype = cases.dtypes(device)[0]
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    for lens in ((20, 33, 0), (700, 1, 64, 90), (5,), (5,), (900, 3)):
        shape = Shape(dtype, 4, 2, 64, lens=lens, qo_lens=(1,) * len(lens))
        paged = cases.paged_cache(rng, b, shape)
        q, q64 = draw_q(rng, b, shape, len(lens))
        key = wrapper._plan_key
        wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, 4, 2, 64, 16, q_data_type=dtype)
        got = wrapper.run(q, paged.cache)
        assert_close(b.float64(got), reference(q64, paged, shape)[0], **cases.tolerance(dtype, device), name=str(lens))
        if len(lens) == 4:
            assert key is wrapper._plan_key, "the options are looked up"
        if len(lens) == 1:
            with pytest.warns(DeprecationWarning):
                wrapper.forward(q, paged.cache, logits_soft_cap=1.0, sm_scale=2.0, window_left=2)
            wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, 4, 2, 64, 16, q_data_type=dtype)
            assert_same_bits(b.numpy(wrapper.run(q, paged.cache)), b.numpy(got), "after forward()")
            with pytest.warns(DeprecationWarning):
                wrapper.forward(q, paged.cache, window_left=2)


def test_a_page_beyond_the_cache_is_seen_in_later_plans(rng, backend_arrays, device):
    shape = Shape(cases.dtypes(device)[0], 4, 2, 64, lens=(20, 33), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q, _ = draw_q(rng, backend_arrays, shape, 2)
    wrapper = make_wrapper(shape, paged)
    wrapper.run(q, paged.cache)
    indices = [*paged.indices[:-1].tolist(), 1 << 20]
    wrapper.plan(paged.indptr, indices, paged.last_page_len, 4, 2, 64, 16, q_data_type=shape.dtype, **shape.options)
    with pytest.raises(ValueError, match=r"paged_kv_indices names a page outside the cache: got 1048576, wanted 0\.\."):
        wrapper.run(q, paged.cache)


def graph_wrapper(b: Backend, batch: int, pages: int):
    buffers = [b.array(np.full(n, -7), "int32") for n in (batch + 1, pages, batch)]
    return CUDAGraphBatchDecodeWithPagedKVCacheWrapper(b.array(np.zeros(64 << 20, np.uint8)), *buffers), buffers


def test_graph_mode_plans_stay_in_their_buffers(rng, backend_arrays, device):
    """Every later plan keeps grid, sections and workspace of the first, fills the caller's buffers, and gives the eager result."""
    b = backend_arrays
    wrapper, buffers = graph_wrapper(b, 4, 64)
    assert wrapper.is_cuda_graph_enabled
    fixed = None
    for _ in range(6):
        shape = Shape(
            cases.dtypes(device)[0], 4, 2, 64, lens=tuple(int(n) for n in rng.integers(0, 200, 4)), qo_lens=(1,) * 4
        )
        paged = cases.paged_cache(rng, b, shape)
        wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, 4, 2, 64, 16, q_data_type=shape.dtype)
        plan = wrapper.plan_info
        now = (plan.max_work, plan.max_partials, plan.workspace_bytes, plan.offsets, plan.tile_q)
        assert fixed in (None, now)
        fixed = now
        assert_same_bits(b.numpy(buffers[0]), paged.indptr)
        assert_same_bits(b.numpy(buffers[1])[: paged.indptr[-1]], paged.indices)
        assert_same_bits(b.numpy(buffers[2]), paged.last_page_len)
        q, q64 = draw_q(rng, b, shape, 4)
        want, _ = reference(q64, paged, shape)
        assert_close(b.float64(wrapper.run(q, paged.cache)), want, **cases.tolerance(shape.dtype, device))


@pytest.mark.gpu
def test_cuda_graph_replays_follow_plans(rng, backend_arrays):
    """Captured once, replayed after many plans (growing, shrinking, empty): the bits of an eager run with the same schedule."""
    import torch

    b = backend_arrays
    pages, ps = 512, 16
    cache = torch.randn(pages, 2, ps, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.empty(8, 8, 128, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    wrapper, _ = graph_wrapper(b, 8, pages)
    eager, _ = graph_wrapper(b, 8, pages)

    def plan(w, lens):
        indptr, indices, last, _ = cases.page_table(rng, lens, ps, spare=0)
        table = (indptr, rng.permutation(pages)[: len(indices)].astype(np.int32), last)
        w.plan(*table, 8, 2, 128, ps)
        return table

    plan(wrapper, [100] * 8)
    wrapper.run(q, cache, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, cache, out=out)
    for i in range(50):
        lens = rng.integers(0, 1000, 8) if i % 5 else rng.permutation([0, 0, 0, 0, 0, 0, 1, 4000 if i else 0])
        table = plan(wrapper, lens)
        eager.plan(*table, 8, 2, 128, ps)
        q.copy_(torch.randn_like(q))
        out.fill_(float("nan"))
        graph.replay()
        assert_same_bits(b.numpy(out), b.numpy(eager.run(q, cache)), f"replay {i}, lengths {lens.tolist()}")


@pytest.mark.gpu
def test_two_wrappers_share_a_workspace(rng, backend_arrays):
    """Interleaved runs of two plans with different split layouts in one workspace."""
    workspace = backend_arrays.array(np.full(32 << 20, 255, np.uint8))
    runs = []
    for lens, heads in (((5000, 3), 1), ((9, 700, 2100), 2)):
        shape = Shape("float16", 4 * heads, heads, 128, lens=lens, qo_lens=(1,) * len(lens))
        paged = cases.paged_cache(rng, backend_arrays, shape)
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, 4 * heads, heads, 128, 16)
        assert wrapper.plan_info.num_partials
        q, q64 = draw_q(rng, backend_arrays, shape, len(lens))
        runs.append((wrapper, q, paged, reference(q64, paged, shape)[0]))
    for _ in range(3):
        for wrapper, q, paged, want in runs:
            assert_close(
                backend_arrays.float64(wrapper.run(q, paged.cache)), want, **cases.tolerance("float16", "cuda")
            )


@pytest.mark.gpu
def test_second_device(rng):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    b = Backend("torch", "cuda:1")
    shape = Shape("float16", 4, 2, 64, lens=(20, 33), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, b, shape)
    q, q64 = draw_q(rng, b, shape, 2)
    got = make_wrapper(shape, paged).run(q, paged.cache)
    assert got.device == q.device
    assert_close(b.float64(got), reference(q64, paged, shape)[0], **cases.tolerance("float16", "cuda"))
