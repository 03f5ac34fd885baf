"""Cascade attention against the float64 reference over each request's whole sequence."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import warnings

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.arrays import EPSILON, assert_close, assert_same_bits
from tests.attention_cases import Shape
from tests.reference.attention import attention

OP = "MultiLevelCascadeAttentionWrapper"


def indptr_of(lens) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def tolerance(dtype: str, device: str) -> dict[str, float]:
    """Each level's output is rounded to the type before the merge."""
    once = cases.tolerance(dtype, device)
    return {"rtol": once["rtol"] + 2 * EPSILON[dtype], "atol": 2e-6}


class Tree:
    """Levels of groups over one cache: `members[level]` lists, for each group, the requests in it (neighbours); `lens[level]` the groups' keys."""

    def __init__(self, rng, backend, shape: Shape, members, lens, qo_lens) -> None:
        self.members, self.qo_lens = members, qo_lens
        flat = [n for level in lens for n in level]
        shape = Shape(**{**shape.__dict__, "lens": tuple(flat), "qo_lens": (1,) * len(flat)})
        self.shape, self.paged = shape, cases.paged_cache(rng, backend, shape)
        self.tables = []
        first = 0
        for groups, level_lens in zip(members, lens, strict=True):
            last = first + len(level_lens)
            at = self.paged.indptr[first : last + 1]
            self.tables.append(
                (
                    indptr_of([sum(qo_lens[r] for r in group) for group in groups]),
                    (at - at[0]).astype(np.int32),
                    self.paged.indices[at[0] : at[-1]],
                    self.paged.last_page_len[first:last],
                )
            )
            first = last

    def plan(self, wrapper, **options) -> None:
        s = self.shape
        wrapper.plan(
            *(list(x) for x in zip(*self.tables, strict=True)),
            s.num_qo_heads,
            s.num_kv_heads,
            s.head_dim,
            s.page_size,
            q_data_type=s.dtype,
            **options,
        )

    def expected(self, q64, *, causal=False, **options):
        """Each request alone, over its whole chain of keys. Bottom-right causality over the chain hides own keys alone, so long as there are as many as queries."""
        outs, lses, row = [], [], 0
        offsets = np.concatenate([[0], np.cumsum([len(level) for level in self.members])])
        for request, n in enumerate(self.qo_lens):
            chain = [
                offsets[level] + next(g for g, group in enumerate(groups) if request in group)
                for level, groups in enumerate(self.members)
            ]
            k, v = (np.concatenate([part[i] for i in chain]) for part in (self.paged.k, self.paged.v))
            out, lse = attention(q64[row : row + n], k, v, causal=causal, **options)
            outs.append(out)
            lses.append(lse)
            row += n
        return np.concatenate(outs), np.concatenate(lses)


TREES = {
    "two levels, decode": (
        [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]],
        [[130], [1, 0, 16, 17, 45]],
        (1, 1, 1, 1, 1),
    ),
    "two levels, prefill": ([[[0, 1], [2]], [[0], [1], [2]]], [[75, 33], [40, 9, 100]], (40, 3, 61)),
    "three levels": (
        [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]],
        [[64], [17, 0], [5, 8, 1, 30]],
        (5, 2, 1, 20),
    ),
    "nothing shared": ([[[0, 1]], [[0], [1]]], [[0], [20, 7]], (2, 3)),
    "nothing at all": ([[[0, 1]], [[0], [1]]], [[0], [0, 7]], (2, 3)),
    "one level": ([[[0], [1]]], [[20, 33]], (2, 3)),
    "a long prefix": ([[[0, 1, 2]], [[0], [1], [2]]], [[1500], [30, 7, 100]], (30, 1, 25)),
    "no rows for a request": ([[[0, 1, 2]], [[0], [1], [2]]], [[50], [9, 4, 3]], (2, 0, 1)),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("causal", [False, True])
def test_cascade(rng, backend, device, name, causal):
    members, lens, qo_lens = TREES[name]
    if causal and name == "nothing at all":
        qo_lens = (2, 7)
    dtype = cases.dtypes(device)[len(name) % 2]
    layout, form = [("NHD", "tuple"), ("HND", "combined")][int(rng.integers(2))]
    tree = Tree(rng, backend, Shape(dtype, 6, 2, 64, (16, 1, 3)[len(name) % 3], layout, form), members, lens, qo_lens)
    wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(len(members), None, layout)
    options = {"logits_soft_cap": 4.0, "sm_scale": 0.2} if causal else {}
    tree.plan(wrapper, causal=causal, **options)
    q = backend.array(rng.standard_normal((sum(qo_lens), 6, 64)), dtype)
    want, want_lse = tree.expected(backend.float64(q), causal=causal, **options)
    out, lse = backend.full(want.shape, np.nan, dtype), backend.full(want_lse.shape, np.nan, "float32")
    got = wrapper.run(q, tree.paged.cache, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    assert_close(backend.float64(out), want, **tolerance(dtype, device), name=name)
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name="lse")
    again = wrapper.run(q, tree.paged.cache)
    assert backend.is_own(again)
    assert_same_bits(backend.numpy(again), backend.numpy(out), "second run")


def test_scales(rng, backend_arrays, device):
    b = backend_arrays
    members, lens, qo_lens = TREES["two levels, prefill"]
    tree = Tree(rng, b, Shape(cases.dtypes(device)[0], 4, 2, 64), members, lens, qo_lens)
    wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(2)
    tree.plan(wrapper)
    q = b.array(rng.standard_normal((sum(qo_lens), 4, 64)), tree.shape.dtype)
    got = wrapper.run(q, tree.paged.cache, q_scale=0.5, k_scale=1.5, v_scale=-2.0)
    want, _ = tree.expected(b.float64(q), sm_scale=0.75 / 8, v_scale=-2.0)
    assert_close(b.float64(got), want, **tolerance(tree.shape.dtype, device))


def graph_wrapper(b, batch: int, pages: tuple[int, int]):
    sizes = [(2, batch + 1), (2, batch + 1), pages, (1, batch)]
    buffers = [[b.array(np.full(n, -7), "int32") for n in pair] for pair in sizes]
    return pyinfer.MultiLevelCascadeAttentionWrapper(
        2, b.array(np.zeros(64 << 20, np.uint8)), "NHD", True, *buffers
    ), buffers


def random_tree(rng, b, device, i: int) -> Tree:
    qo_lens = (20, 20, 20) if i == 0 else tuple(int(n) for n in rng.integers(0, 20, 3))
    lens = [[int(rng.integers(0, 200))], [int(rng.integers(n, n + 60)) for n in qo_lens]]
    return Tree(rng, b, Shape(cases.dtypes(device)[0], 4, 2, 64), [[[0, 1, 2]], [[0], [1], [2]]], lens, qo_lens)


def test_graph_mode_plans_stay_in_their_buffers(rng, backend_arrays, device):
    b = backend_arrays
    wrapper, buffers = graph_wrapper(b, 3, (20, 20))
    assert wrapper.is_cuda_graph_enabled
    fixed = None
    for i in range(4):
        tree = random_tree(rng, b, device, i)
        tree.plan(wrapper, causal=True)
        now = [(p.max_work, p.max_partials, p.workspace_bytes, p.offsets, p.tile_q) for p in wrapper.plan_info]
        assert fixed in (None, now)
        fixed = now
        for arrays, pair in zip(zip(*tree.tables, strict=True), buffers, strict=True):
            for values, buffer in zip(arrays, pair, strict=True):
                assert_same_bits(b.numpy(buffer)[: len(values)], values)
        q = b.array(rng.standard_normal((60, 4, 64)), tree.shape.dtype)
        rows = sum(tree.qo_lens)
        want, _ = tree.expected(b.float64(q)[:rows], causal=True)
        assert_close(b.float64(wrapper.run(q, tree.paged.cache))[:rows], want, **tolerance(tree.shape.dtype, device))


@pytest.mark.gpu
def test_cuda_graph_replays_follow_plans(rng, backend_arrays):
    import torch

    b = backend_arrays
    cache = torch.randn(256, 2, 16, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.empty(80, 8, 128, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    (wrapper, _), (eager, _) = graph_wrapper(b, 4, (128, 256)), graph_wrapper(b, 4, (128, 256))

    def tables(qo_lens, shared, lens):
        levels = []
        for qo, kv in (([sum(qo_lens)], [shared]), (qo_lens, lens)):
            indptr, indices, last, _ = cases.page_table(rng, kv, 16, spare=0)
            levels.append((indptr_of(qo), indptr, rng.permutation(256)[: len(indices)].astype(np.int32), last))
        return [list(x) for x in zip(*levels, strict=True)]

    first = tables([20] * 4, 2000, [100] * 4)
    for w in (wrapper, eager):
        w.plan(*first, 8, 2, 128, 16, causal=True)
    wrapper.run(q, cache, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, cache, out=out)
    for i in range(20):
        qo_lens = [int(n) for n in rng.integers(0, 20, 4)]
        table = tables(qo_lens, int(rng.integers(0, 2000)), [n + int(rng.integers(0, 900)) for n in qo_lens])
        for w in (wrapper, eager):
            w.plan(*table, 8, 2, 128, 16, causal=True)
        q.copy_(torch.randn_like(q))
        out.fill_(float("nan"))
        graph.replay()
        rows = sum(qo_lens)
        assert_same_bits(b.numpy(out)[:rows], b.numpy(eager.run(q, cache))[:rows], f"replay {i}")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_shared_prefix_wrappers(rng, backend, device, layout, decode):
    dtype = cases.dtypes(device)[0]
    lens, qo_lens = ((5, 0, 40), (1, 1, 1)) if decode else ((5, 21, 40), (5, 1, 17))
    shape = Shape(dtype, 6, 2, 64, 16, layout, lens=lens, qo_lens=qo_lens)
    paged = cases.paged_cache(rng, backend, shape)
    q, k, v = (
        backend.array(rng.standard_normal(s), dtype)
        for s in ((sum(qo_lens), 6, 64), *[(70, 2, 64) if layout == "NHD" else (2, 70, 64)] * 2)
    )
    q64, k64, v64 = (backend.float64(x) for x in (q, k, v))
    if layout == "HND":
        k64, v64 = k64.swapaxes(0, 1), v64.swapaxes(0, 1)
    table = (paged.indptr, paged.indices, paged.last_page_len, 6, 2, 64, 16)
    name = f"Batch{'Decode' if decode else 'Prefill'}WithSharedPrefixPagedKVCacheWrapper"
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated; use MultiLevelCascadeAttentionWrapper"):
        wrapper = getattr(pyinfer, name)(None, layout)
    with pytest.raises(ValueError, match=rf"{name}: begin_forward\(\) was not called: got forward\(\) first"):
        wrapper.forward(q, k, v, paged.cache)
    if decode:
        wrapper.begin_forward(*table, data_type=dtype)
    else:
        wrapper.begin_forward(indptr_of(qo_lens), *table, q_data_type=dtype)
    for arg in ("rope_scale", "rope_theta"):
        with pytest.raises(
            ValueError, match=f"{name}: {arg} has nothing to act on: nothing is rotated here: got 1.0, wanted None"
        ):
            wrapper.forward(q, k, v, paged.cache, **{arg: 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = wrapper.forward(q, k, v, paged.cache, **({} if decode else {"causal": True}), sm_scale=0.2)
        wrapper.end_forward()
    keys, values = (
        [np.concatenate([shared, own]) for own in parts] for shared, parts in ((k64, paged.k), (v64, paged.v))
    )
    want, _ = cases.expected(q64, qo_lens, keys, values, causal=not decode, sm_scale=0.2)
    assert_close(backend.float64(got), want, **tolerance(dtype, device))


def test_deprecated_aliases(rng, backend_arrays, device):
    b = backend_arrays
    members, lens, qo_lens = TREES["two levels, decode"]
    tree = Tree(rng, b, Shape(cases.dtypes(device)[0], 4, 2, 64), members, lens, qo_lens)
    wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(2)
    s = tree.shape
    with pytest.warns(DeprecationWarning, match="begin_forward is deprecated; use plan"):
        wrapper.begin_forward(
            *(list(x) for x in zip(*tree.tables, strict=True)), 4, 2, 64, s.page_size, q_data_type=s.dtype
        )
    q = b.array(rng.standard_normal((5, 4, 64)), s.dtype)
    with pytest.warns(DeprecationWarning, match="forward is deprecated; use run"):
        got = wrapper.forward(q, tree.paged.cache)
    with pytest.warns(DeprecationWarning, match="end_forward is deprecated"):
        wrapper.end_forward()
    wrapper.reset_workspace_buffer(b.array(np.zeros(1 << 20, np.uint8)))
    assert_same_bits(b.numpy(got), b.numpy(wrapper.run(q, tree.paged.cache)))


def plan(wrapper=None, **changes):
    args = dict(
        qo_indptr_arr=[[0, 2], [0, 1, 2]],
        paged_kv_indptr_arr=[[0, 1], [0, 1, 2]],
        paged_kv_indices_arr=[[0], [1, 2]],
        paged_kv_last_page_len=[[16], [3, 4]],
    )
    wrapper = wrapper or pyinfer.MultiLevelCascadeAttentionWrapper(2)
    wrapper.plan(
        **{**args, **changes.pop("tables", {})},
        **{**dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16), **changes},
    )
    return wrapper


REFUSED = {
    "levels": (lambda: pyinfer.MultiLevelCascadeAttentionWrapper(0), ValueError, f"{OP}: num_levels is no number of levels: got 0, wanted 1 or more"),
    "layout": (lambda: pyinfer.MultiLevelCascadeAttentionWrapper(1, None, "NDH"), ValueError, f"{OP}: kv_layout is no layout: got 'NDH'"),
    "no buffers": (lambda: pyinfer.MultiLevelCascadeAttentionWrapper(2, None, "NHD", True), ValueError, f"{OP}: qo_indptr_buf_arr is no list of levels: got NoneType, wanted a list of 2"),
    "few buffers": (lambda: pyinfer.MultiLevelCascadeAttentionWrapper(2, None, "NHD", True, [1], [1], [1], [1]), ValueError, "qo_indptr_buf_arr has the wrong number of levels: got 1, wanted 2"),
    "no list": (lambda: plan(tables={"qo_indptr_arr": np.array([0, 2])}), ValueError, "qo_indptr_arr is no list of levels: got ndarray, wanted a list of 2"),
    "few levels": (lambda: plan(tables={"paged_kv_indices_arr": [[0]]}), ValueError, "paged_kv_indices_arr has the wrong number of levels: got 1, wanted 2"),
    "rows": (lambda: plan(tables={"qo_indptr_arr": [[0, 3], [0, 1, 2]]}), ValueError, r"qo_indptr_arr\[1\] covers another number of rows: got 2, wanted 3 \(as level 0\)"),
    "window": (lambda: plan(window_left=7), ValueError, "window_left does not reach across levels: got 7, wanted -1 with more than one level. Use BatchPrefillWithPagedKVCacheWrapper"),
    "rope": (lambda: plan(pos_encoding_mode="ROPE_LLAMA"), ValueError, "pos_encoding_mode does not reach across levels: got 'ROPE_LLAMA', wanted 'NONE' with more than one level. Rotate q and k"),
    "page": (lambda: plan(tables={"paged_kv_last_page_len": [[17], [3, 4]]}), ValueError, "paged_kv_last_page_len is out of range: got 17"),
    "run first": (lambda: pyinfer.MultiLevelCascadeAttentionWrapper(2).run(1, 2), ValueError, rf"{OP}: plan\(\) was not called: got run\(\) first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call()


def test_half_a_plan_is_none(backend_arrays, device):
    b = backend_arrays
    dtype = cases.dtypes(device)[0]
    wrapper = plan(q_data_type=dtype)
    q, cache = b.full((2, 4, 64), 1, dtype), (b.full((3, 16, 2, 64), 1, dtype),) * 2
    assert (b.float64(wrapper.run(q, cache)) == 1).all()
    with pytest.raises(ValueError, match="covers another number of rows"):
        plan(wrapper, tables={"qo_indptr_arr": [[0, 3], [0, 1, 2]]}, q_data_type=dtype)
    with pytest.raises(ValueError, match=r"plan\(\) was not called"):
        wrapper.run(q, cache)
    plan(wrapper, q_data_type=dtype)
    for arg, bad in (("out", b.full((3, 4, 64), 0, dtype)), ("lse", b.full((2, 3), 0, "float32"))):
        with pytest.raises(ValueError, match=f"{OP}: {arg} has the wrong shape"):
            wrapper.run(q, cache, **{arg: bad})
