"""The prefill of one request and the decode of a batch together, against the float64 reference."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests import stub_driver
from tests.arrays import assert_close, assert_same_bits
from tests.attention_cases import Shape
from tests.reference.attention import attention

OP = "PODWithPagedKVCacheWrapper"


def planned(shape: Shape, paged, **options):
    wrapper = pyinfer.PODWithPagedKVCacheWrapper(None, shape.layout)
    wrapper.plan(
        paged.indptr,
        paged.indices,
        paged.last_page_len,
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
        q_data_type=shape.dtype,
        **options,
    )
    return wrapper


CASES = [
    ((8, 2), 64, 70, 90),
    ((4, 1), 128, 1, 40),
    ((3, 3), 64, 200, 200),
    ((24, 1), 64, 9, 3),
    ((6, 2), 256, 33, 50),
    ((2, 1), 64, 0, 9),
    ((2, 1), 64, 5, 0),
]


@pytest.mark.parametrize("i", range(len(CASES)))
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_left": 13, "sm_scale": 0.2}], ids=str
)
def test_pod(rng, backend, device, i, options):
    (hq, hk), dim, qo_len, kv_len = CASES[i]
    dtype = cases.dtypes(device)[i % len(cases.dtypes(device))]
    lens = (1, 0, 45, 300, 16)
    shape = Shape(
        dtype, hq, hk, dim, (16, 1, 3)[i % 3], ("NHD", "HND")[i % 2], ("tuple", "combined", "strided")[i % 3], lens
    )
    paged = cases.paged_cache(rng, backend, shape)
    decode = {k: v for k, v in options.items() if k != "causal"}
    wrapper = planned(shape, paged, **decode)
    layout_p = ("HND", "NHD")[i % 2]
    dims = (kv_len, hk, dim) if layout_p == "NHD" else (hk, kv_len, dim)
    q_p, k_p, v_p, q_d = (
        backend.array(rng.standard_normal(s), dtype) for s in ((qo_len, hq, dim), dims, dims, (len(lens), hq, dim))
    )
    run = dict(
        causal_p=options.get("causal", False),
        kv_layout_p=layout_p,
        window_left_p=options.get("window_left", -1),
        sm_scale_p=options.get("sm_scale"),
    )
    (out_p, lse_p), (out_d, lse_d) = wrapper.run(
        q_p, k_p, v_p, q_d, paged.cache, **run, k_scale=0.5, v_scale=2.0, return_lse_p=True, return_lse_d=True
    )
    assert all(map(backend.is_own, (out_p, lse_p, out_d, lse_d)))
    k64, v64 = (backend.float64(x) if layout_p == "NHD" else backend.float64(x).swapaxes(0, 1) for x in (k_p, v_p))
    want_p, want_lse_p = attention(backend.float64(q_p), k64, v64, **options)
    scale = 0.5 * options.get("sm_scale", dim**-0.5)
    want_d, want_lse_d = cases.expected(
        backend.float64(q_d), shape.qo_lens, paged.k, paged.v, **{**decode, "sm_scale": scale}, v_scale=2.0
    )
    for got, lse, want, want_lse in ((out_p, lse_p, want_p, want_lse_p), (out_d, lse_d, want_d, want_lse_d)):
        assert_close(backend.float64(got), want, **cases.tolerance(dtype, device), name=str(shape))
        assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name="lse")
    again = wrapper.run(q_p, k_p, v_p, q_d, paged.cache, **run, k_scale=0.5, v_scale=2.0)
    assert_same_bits(backend.numpy(again[0]), backend.numpy(out_p), "second run, prefill")
    assert_same_bits(backend.numpy(again[1]), backend.numpy(out_d), "second run, decode")


def test_long_requests_split(rng, backend_arrays, device):
    """Both parts are split into pieces, and merged in their own partials."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    shape = Shape(dtype, 4, 1, 64, lens=(3000, 5, 1500), qo_lens=(1, 1, 1))
    paged = cases.paged_cache(rng, b, shape)
    wrapper = planned(shape, paged)
    q_p, k_p, v_p, q_d = (
        b.array(rng.standard_normal(s), dtype) for s in ((20, 4, 64), (4000, 1, 64), (4000, 1, 64), (3, 4, 64))
    )
    for _ in range(3):  # semaphores are left as they were found
        out_p, out_d = wrapper.run(q_p, k_p, v_p, q_d, paged.cache, causal_p=True)
        assert_close(
            b.float64(out_p),
            attention(*(b.float64(x) for x in (q_p, k_p, v_p)), causal=True)[0],
            **cases.tolerance(dtype, device),
        )
        assert_close(
            b.float64(out_d),
            cases.expected(b.float64(q_d), shape.qo_lens, paged.k, paged.v)[0],
            **cases.tolerance(dtype, device),
        )


@pytest.mark.gpu
def test_one_launch(rng, backend_arrays, monkeypatch):
    """A plain case is one launch of the fused kernel, with the bits of a fallback no worse than one rounding away; an odd one is two launches."""
    b = backend_arrays
    shape = Shape("float16", 8, 2, 128, lens=(300, 40), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, b, shape)
    wrapper = planned(shape, paged)
    q_p, k_p, v_p, q_d = (
        b.array(rng.standard_normal(s), "float16") for s in ((200, 8, 128), (200, 2, 128), (200, 2, 128), (2, 8, 128))
    )
    wrapper.run(q_p, k_p, v_p, q_d, paged.cache)
    names = stub_driver.names_of_launches(monkeypatch)
    wrapper.run(q_p, k_p, v_p, q_d, paged.cache)
    assert len(names) == 1 and names[0].startswith("pod_sm80")


@pytest.mark.gpu
def test_cuda_graph(rng, backend_arrays):
    import torch

    b = backend_arrays
    buffers = [b.array(np.zeros(n), "int32") for n in (5, 256, 4)]

    def make():
        workspace = b.array(np.zeros(8 << 20, np.uint8))
        return pyinfer.PODWithPagedKVCacheWrapper(workspace, "NHD", True, *(x.clone() for x in buffers))

    wrapper, eager = make(), make()
    cache = torch.randn(256, 2, 16, 2, 128, dtype=torch.float16, device="cuda")
    q_p, k_p, v_p, q_d = (
        torch.randn(*s, dtype=torch.float16, device="cuda")
        for s in ((150, 8, 128), (400, 2, 128), (400, 2, 128), (4, 8, 128))
    )

    def plan(lens):
        indptr, indices, last, _ = cases.page_table(rng, lens, 16, spare=0)
        table = (indptr, rng.permutation(256)[: len(indices)].astype(np.int32), last)
        for w in (wrapper, eager):
            w.plan(*table, 8, 2, 128, 16)

    plan([900] * 4)
    wrapper.run(q_p, k_p, v_p, q_d, cache, causal_p=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_p, out_d = wrapper.run(q_p, k_p, v_p, q_d, cache, causal_p=True)
    for i in range(20):
        plan(rng.integers(0, 1000, 4))
        for x in (q_p, k_p, v_p, q_d):
            x.copy_(torch.randn_like(x))
        graph.replay()
        want_p, want_d = eager.run(q_p, k_p, v_p, q_d, cache, causal_p=True)
        assert_same_bits(b.numpy(out_p), b.numpy(want_p), f"prefill of replay {i}")
        assert_same_bits(b.numpy(out_d), b.numpy(want_d), f"decode of replay {i}")


def run(x, layout="NHD", plan=None, **options):
    b, dtype = x
    wrapper = pyinfer.PODWithPagedKVCacheWrapper(None, layout)
    wrapper.plan([0, 1], [0], [3], 4, 2, 64, 16, q_data_type=dtype, **(plan or {}))
    cache = (b.full((2, 16, 2, 64) if layout == "NHD" else (2, 2, 16, 64), 0, dtype),) * 2
    args = dict(
        q_p=b.full((3, 4, 64), 0, dtype),
        k_p=b.full((5, 2, 64), 0, dtype),
        v_p=b.full((5, 2, 64), 0, dtype),
        q_d=b.full((1, 4, 64), 0, dtype),
        paged_kv_cache_d=cache,
    )
    return wrapper.run(**{**args, **options})


def test_the_inputs_are_valid(backend_arrays, device):
    x = backend_arrays, cases.dtypes(device)[0]
    for options in (
        {},
        {
            "causal_d": True,
            "kv_layout_d": "NHD",
            "pos_encoding_mode_d": "NONE",
            "window_left_d": -1,
            "sm_scale_d": 0.125,
            "use_fp16_qk_reduction": False,
        },
    ):
        out_p, out_d = run(x, **options)
        assert tuple(out_p.shape) == (3, 4, 64) and tuple(out_d.shape) == (1, 4, 64)
    with pytest.warns(DeprecationWarning, match="begin_forward is deprecated; use plan"):
        pyinfer.PODWithPagedKVCacheWrapper().begin_forward([0, 1], [0], [3], 4, 2, 64, 16, q_data_type=x[1])


REFUSED = {
    "layout": (lambda x: pyinfer.PODWithPagedKVCacheWrapper(None, "NDH"), ValueError, f"{OP}: kv_layout is no layout: got 'NDH'"),
    "jit_args": (lambda x: pyinfer.PODWithPagedKVCacheWrapper(jit_args=[1]), ValueError, "jit_args is not supported: got list, wanted None"),
    "run first": (lambda x: pyinfer.PODWithPagedKVCacheWrapper().run(1, 2, 3, 4, 5), ValueError, rf"{OP}: plan\(\) was not called: got run\(\) first"),
    "mask": (lambda x: run(x, custom_mask_d=x[0].full((1, 3), 1, "float32")), ValueError, r"custom_mask_d is not an argument of run\(\): got \w+, wanted None. plan\(\) decides about decode"),
    "rope": (lambda x: run(x, rope_theta_d=5.0), ValueError, r"rope_theta_d is not an argument of run\(\): got float"),
    "window": (lambda x: run(x, window_left_d=4), ValueError, r"window_left_d differs from the plan: got 4, wanted None or -1\. plan\(\) decides about decode"),
    "scale": (lambda x: run(x, sm_scale_d=4.0), ValueError, "sm_scale_d differs from the plan: got 4.0, wanted None or 0.125"),
    "layout d": (lambda x: run(x, "HND", kv_layout_d="NHD"), ValueError, "kv_layout_d differs from the plan: got 'NHD', wanted None or 'HND'"),
    "encoding d": (lambda x: run(x, pos_encoding_mode_d="ALIBI"), ValueError, "pos_encoding_mode_d differs from the plan: got 'ALIBI', wanted None or 'NONE'"),
    "layout p": (lambda x: run(x, kv_layout_p="NDH"), ValueError, f"{OP}: kv_layout is no layout: got 'NDH'"),
    "window p": (lambda x: run(x, window_left_p=-3), ValueError, "window_left is no window: got -3"),
    "q_p": (lambda x: run(x, q_p=x[0].full((3, 64), 0, x[1])), ValueError, "q has the wrong number of axes: got 2"),
    "q_d": (lambda x: run(x, q_d=x[0].full((2, 4, 64), 0, x[1])), ValueError, rf"{OP}: q has the wrong shape: got \(2, 4, 64\), wanted \(1, 4, 64\)"),
    "k_p": (lambda x: run(x, k_p=x[0].full((5, 2, 32), 0, x[1])), ValueError, "k differs from q in head_dim: got 32"),
    "positional": (lambda x: pyinfer.PODWithPagedKVCacheWrapper.run(planned_one(x), *[None] * 30, 1), ValueError, r"\*args are not supported: got 1 extra arguments"),
}  # fmt: skip


def planned_one(x):
    wrapper = pyinfer.PODWithPagedKVCacheWrapper()
    wrapper.plan([0, 1], [0], [3], 4, 2, 64, 16, q_data_type=x[1])
    return wrapper


@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend_arrays, device, name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call((backend_arrays, cases.dtypes(device)[0]))
