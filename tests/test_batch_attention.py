"""Prefill and decode requests in one batch, against the float64 reference; the mixed plan; what the fused launch packs."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import pyinfer
from pyinfer.core.dtypes import BFLOAT16, FLOAT32
from pyinfer.core.tensor import TensorView, view
from pyinfer.schedulers import mixed
from tests import attention_cases as cases
from tests.arrays import assert_close, assert_same_bits
from tests.attention_cases import Shape

OP = "BatchAttention"
BATCHES = [
    ((1, 60, 1, 0, 17, 1), (33, 60, 0, 5, 100, 140)),
    ((1, 1, 1), (16, 300, 1)),
    ((130, 7), (130, 90)),
    ((40, 3), (9, 2)),
    ((), ()),
    ((0, 0), (3, 0)),
]


def indptr_of(lens) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def planned(shape: Shape, paged, **changes):
    wrapper = pyinfer.BatchAttention(shape.layout)
    args = dict(
        qo_indptr=indptr_of(shape.qo_lens),
        kv_indptr=paged.indptr,
        kv_indices=paged.indices,
        kv_len_arr=np.asarray(paged.lens, np.int32),
        num_qo_heads=shape.num_qo_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim_qk=shape.head_dim,
        head_dim_vo=shape.head_dim,
        page_size=shape.page_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    wrapper.plan(**{**args, **shape.options, **changes})
    return wrapper


@pytest.mark.parametrize("batch", range(len(BATCHES)))
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "logits_soft_cap": 4.0, "sm_scale": 0.3}], ids=str
)
def test_batch_attention(rng, backend, device, batch, options):
    qo_lens, lens = BATCHES[batch]
    dtypes = cases.dtypes(device)
    heads, dim = [((8, 2), 64), ((7, 1), 128), ((4, 4), 64), ((24, 1), 64)][(batch + len(options)) % 4]
    shape = Shape(
        dtypes[batch % len(dtypes)],
        *heads,
        dim,
        (16, 1, 3)[batch % 3],
        ("NHD", "HND")[batch % 2],
        ("tuple", "combined", "strided")[(batch + len(options)) % 3],
        lens,
        qo_lens,
        options,
    )
    paged = cases.paged_cache(rng, backend, shape)
    on_device = batch % 2 == 1
    wrapper = planned(shape, paged, **({"kv_indices": backend.array(paged.indices)} if on_device else {}))
    q = backend.array(rng.standard_normal((sum(qo_lens), heads[0], dim)), shape.dtype)
    want, want_lse = (
        cases.expected(backend.float64(q), qo_lens, paged.k, paged.v, **options)
        if lens
        else (np.zeros((0, heads[0], dim)), np.zeros((0, heads[0])))
    )
    out, lse = backend.full(want.shape, np.nan, shape.dtype), backend.full(want_lse.shape, np.nan, "float32")
    got = wrapper.run(q, paged.cache, out, lse)
    assert got[0] is out and got[1] is lse
    assert_close(backend.float64(out), want, **cases.tolerance(shape.dtype, device), name=str(shape))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name="lse")
    again = wrapper.run(q, paged.cache, logits_soft_cap=options.get("logits_soft_cap", 0.0))
    assert_same_bits(backend.numpy(again[0]), backend.numpy(out), "second run")
    assert_same_bits(backend.numpy(again[1]), backend.numpy(lse), "second run, lse")
    assert wrapper.plan_info is not None


def test_many_requests_split(rng, backend_arrays, device):
    """Long requests among short ones: both kinds are split, and merged in their own partials."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    qo_lens, lens = (1, 1, 70, 1, 1, 30), (2500, 3, 1200, 40, 900, 30)
    shape = Shape(dtype, 4, 1, 64, lens=lens, qo_lens=qo_lens, options={"causal": True})
    paged = cases.paged_cache(rng, b, shape)
    wrapper = planned(shape, paged)
    q = b.array(rng.standard_normal((sum(qo_lens), 4, 64)), dtype)
    out, lse = wrapper.run(q, paged.cache, k_scale=0.5, v_scale=2.0)
    want, want_lse = cases.expected(b.float64(q), qo_lens, paged.k, paged.v, causal=True, sm_scale=0.5 / 8, v_scale=2.0)
    assert_close(b.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(b.float64(lse), want_lse, **cases.lse_tolerance(device))


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_spare_pages(rng, backend_arrays, device, on_device):
    """Pages beyond a request's keys are not read."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    shape = Shape(dtype, 4, 2, 64, lens=(33, 0, 16, 5), qo_lens=(20, 1, 1, 5), options={"causal": True})
    paged = cases.paged_cache(rng, b, shape)
    parts = [
        np.append(paged.indices[paged.indptr[i] : paged.indptr[i + 1]], [2] * i).astype(np.int32) for i in range(4)
    ]
    indices = np.concatenate([*parts, [0, 0]]).astype(np.int32)
    wrapper = planned(
        shape,
        paged,
        kv_indptr=indptr_of([len(p) for p in parts]),
        kv_indices=b.array(indices) if on_device else indices,
    )
    q = b.array(rng.standard_normal((27, 4, 64)), dtype)
    want, _ = cases.expected(b.float64(q), shape.qo_lens, paged.k, paged.v, causal=True)
    assert_close(b.float64(wrapper.run(q, paged.cache)[0]), want, **cases.tolerance(dtype, device))


@pytest.mark.gpu
def test_what_the_fused_kernel_does_not_do(rng, backend_arrays):
    """Rows off 16 bytes, and an odd head dimension: the batch prefill runs them."""
    b = backend_arrays
    shape = Shape("float16", 4, 2, 64, lens=(33, 50), qo_lens=(1, 20))
    paged = cases.paged_cache(rng, b, shape)
    wrapper = planned(shape, paged)
    wide = b.array(rng.standard_normal((21, 4, 65)), "float16")
    q = wide[..., :64]
    want, _ = cases.expected(b.float64(q), shape.qo_lens, paged.k, paged.v)
    assert_close(b.float64(wrapper.run(q, paged.cache)[0]), want, **cases.tolerance("float16", "cuda"))
    assert_close(b.float64(wrapper.run(q.contiguous(), paged.cache)[0]), want, **cases.tolerance("float16", "cuda"))
    shape = Shape("bfloat16", 4, 2, 80, lens=(33, 50), qo_lens=(1, 20))
    paged = cases.paged_cache(rng, b, shape)
    q = b.array(rng.standard_normal((21, 4, 80)), "bfloat16")
    want, _ = cases.expected(b.float64(q), shape.qo_lens, paged.k, paged.v)
    assert_close(b.float64(planned(shape, paged).run(q, paged.cache)[0]), want, **cases.tolerance("bfloat16", "cuda"))


# ---- the plan --------------------------------------------------------------------------------------------------------------------
@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(6))
def test_mixed_plan_covers_every_row_once(rng, backend_arrays, seed):
    """Both plans executed one after the other give every row its result, whatever the mixture."""
    from pyinfer.cpu.attention import run_plan

    b = backend_arrays
    n = int(rng.integers(1, 7))
    qo_lens = tuple(int(x) for x in rng.choice([0, 1, 1, 2, 5, 70], n))
    lens = tuple(int(x) for x in rng.choice([0, 1, 17, 200, 900], n))
    shape = Shape("float32", 6, 2, 64, lens=lens, qo_lens=qo_lens)
    paged = cases.paged_cache(rng, b, shape)
    causal = bool(seed % 2)
    plans = mixed.mixed_plan(
        indptr_of(qo_lens),
        paged.indptr,
        paged.indices,
        np.asarray(lens, np.int32),
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim_qk=64,
        head_dim_vo=64,
        page_size=16,
        prefill_tile=(64, 64),
        decode_tile=(16, 64),
        num_sms=20,
        causal=causal,
    )
    assert set(plans.prefill.work[:, 0]).isdisjoint(plans.decode.work[:, 0]) and plans.decode.offsets.kv_indices < 0
    q = b.array(rng.standard_normal((sum(qo_lens), 6, 64)), "float32")
    out, lse = b.full((sum(qo_lens), 6, 64), np.nan, "float32"), b.full((sum(qo_lens), 6), np.nan, "float32")
    k, v = (view(x) for x in paged.cache)
    for plan in (plans.prefill, dataclasses.replace(plans.decode, other_indices=plans.prefill.kv_indices)):
        run_plan(plan, view(q), k, v, "NHD", view(out), view(lse), sm_scale=0.125, logits_soft_cap=0.0, v_scale=1.0)
    want, want_lse = cases.expected(b.float64(q), qo_lens, paged.k, paged.v, causal=causal)
    assert_close(b.float64(out), want, rtol=5e-6, atol=1e-6)
    assert_close(b.float64(lse), want_lse, rtol=2e-6, atol=2e-5)
    loads = mixed.load(plans.prefill), mixed.load(plans.decode)
    assert plans.prefill_rate == mixed.rate(*loads) and (0 < plans.prefill_rate < 65536) == (min(loads) > 0)


@pytest.mark.cpu
def test_blocks_of_both_kinds_in_proportion(rng):
    """Each block of the grid is one item of one kind, every item has its block, in order; until one list ends, kinds come as the rate says."""
    for _ in range(60):
        n_prefill, n_decode = (int(x) for x in rng.choice([0, 1, 2, 7, 40, 300], 2))
        rate = mixed.rate(n_prefill * rng.random(), n_decode * rng.random())
        before = [mixed.prefill_before(b, n_prefill, n_decode, rate) for b in range(n_prefill + n_decode + 1)]
        assert before[0] == 0 and before[-1] == n_prefill
        steps = np.diff(before)
        assert set(steps) <= {0, 1} and len(steps) - steps.sum() == n_decode
        for i, count in enumerate(before):
            if count < n_prefill and i - count < n_decode:
                assert abs(count - i * rate / 65536) <= 1
    assert (
        mixed.rate(0.0, 5.0) == 0
        and mixed.rate(5.0, 0.0) == 65536
        and mixed.rate(1e-9, 1.0) == 1
        and mixed.rate(1.0, 1e-9) == 65535
    )


# ---- the launch ------------------------------------------------------------------------------------------------------------------
class Recorder:
    def __call__(self, stream, grid, values, pdl=False):
        self.stream, self.grid, self.values, self.pdl = stream, grid, values, pdl


def fake(shape, dtype=BFLOAT16, ptr=1 << 20) -> TensorView:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return TensorView(None, ptr, shape, tuple(strides), dtype, 0, "torch")


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_parts_pack_what_the_kernels_of_their_own_take(rng, monkeypatch, layout, cap):
    """Field by field the parameters of launch_attention and launch_single."""
    from pyinfer.jit import attention_launch, pod

    recorder = Recorder()
    monkeypatch.setattr(attention_launch, "_kernel", lambda *args: recorder)
    monkeypatch.setattr(attention_launch, "_planned", attention_launch._planned.__wrapped__)
    attention_launch.prepare_attention.cache_clear()
    lens, qo_lens = np.array([40, 500, 3], np.int32), (1, 90, 1)
    indptr = indptr_of(-(-lens // 16))
    plans = mixed.mixed_plan(
        indptr_of(qo_lens),
        indptr,
        np.arange(indptr[-1], dtype=np.int32),
        lens,
        num_qo_heads=8,
        num_kv_heads=2,
        head_dim_qk=128,
        head_dim_vo=128,
        page_size=16,
        prefill_tile=(128, 64),
        decode_tile=(16, 64),
        num_sms=132,
        ctas_per_sm=2,
        causal=True,
    )
    config = pod.pod_config(90, "bfloat16", 128, 128)
    spec = pod.gen_pod(config, "bfloat16", 128, 128, "plan", "softcap" if cap else "plain")
    q, out, lse = fake((92, 8, 128)), fake((92, 8, 128), ptr=1 << 21), fake((92, 8), FLOAT32, 1 << 22)
    k, v = (fake((50, 16, 2, 128) if layout == "NHD" else (50, 2, 16, 128), ptr=p) for p in (1 << 23, 1 << 24))
    options = dict(sm_scale=0.1, logits_soft_cap=cap, v_scale=3.0)
    parts = []
    for plan, part_config, part_spec, at in (
        (plans.prefill, config.prefill, spec.prefill, 1 << 25),
        (plans.decode, config.decode, spec.decode, 1 << 26),
    ):
        attention_launch.launch_attention(
            0, 7, at, plan, q, k, v, 4096, layout, out, lse, 8192, config=part_config, **options
        )
        part = pod.plan_part(plan, at, q, k, v, 4096, layout, out, lse, 8192, **options)
        assert [part.values[f.name] for f in part_spec.params.fields] == list(recorder.values)
        assert part.blocks == recorder.grid
        parts.append(part)
    values = pod.pack_parts(spec, *parts, plans.prefill_rate)
    assert len(spec.spec.params.pack(*values)) == spec.spec.params.size and values[-3:] == (
        parts[0].blocks,
        parts[1].blocks,
        plans.prefill_rate,
    )
    pod.launch_pod(recorder, spec, 9, *parts, plans.prefill_rate, True)
    assert (recorder.stream, recorder.grid, recorder.pdl) == (9, parts[0].blocks + parts[1].blocks, True)
    attention_launch.prepare_attention.cache_clear()
    if cap:
        return
    single = pod.gen_pod(config, "bfloat16", 128, 128, "single").prefill
    qs, outs = fake((90, 8, 128)), fake((90, 8, 128), ptr=1 << 21)
    ks, vs = (fake((500, 2, 128) if layout == "NHD" else (2, 500, 128), ptr=p) for p in (1 << 23, 1 << 24))
    options = dict(causal=True, window_left=77, sm_scale=0.1, v_scale=1.0, kv_chunk=128, num_splits=4)
    attention_launch.launch_single(0, 7, qs, ks, vs, layout, outs, None, 8192, config=config.prefill, **options)
    part = pod.single_part(config.prefill, qs, ks, vs, layout, outs, None, 8192, **options)
    assert [part.values[f.name] for f in single.params.fields] == list(recorder.values) and part.blocks == recorder.grid


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
def test_fused_kernels_compile_without_spills(arch):
    from pyinfer.jit import pod
    from pyinfer.jit.attention import smem_limits
    from pyinfer.jit.env import arch_number

    number = arch_number(arch)
    per_block, per_sm = smem_limits(number)
    for dim, source in ((64, "plan"), (128, "single"), (256, "plan")):
        config = pod.pod_config(number, "bfloat16", dim, dim)
        spec = pod.gen_pod(config, "bfloat16", dim, dim, source).spec
        used = spec.build(arch).resources
        assert used.spill_stores == used.spill_loads == used.stack == 0, f"{spec.name}: {used}"
        assert used.registers * spec.block[0] * config.ctas_per_sm <= 65536
        assert spec.smem + used.smem <= per_block and config.ctas_per_sm * (spec.smem + used.smem + 1024) <= per_sm


@pytest.mark.cpu
def test_pod_config_refuses():
    from pyinfer.jit.pod import pod_config

    with pytest.raises(TypeError, match="pod: dtype has no CUDA kernel: got float32, wanted float16 or bfloat16"):
        pod_config(90, "float32", 128, 128)
    with pytest.raises(ValueError, match="pod: head_dim has no CUDA kernel: got qk 96, vo 96"):
        pod_config(90, "float16", 96, 96)


# ---- errors ----------------------------------------------------------------------------------------------------------------------
def plan(x, **changes):
    wrapper = pyinfer.BatchAttention(changes.pop("kv_layout", "NHD"))
    args = dict(
        qo_indptr=[0, 1, 3],
        kv_indptr=[0, 2, 3],
        kv_indices=[4, 0, 5],
        kv_len_arr=[19, 16],
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim_qk=64,
        head_dim_vo=64,
        page_size=16,
        q_data_type=x[1],
        kv_data_type=x[1],
    )
    wrapper.plan(**{**args, **changes})
    return wrapper


def run(x, changes=None, q=None, cache=None, **options):
    b, dtype = x
    cache = (b.full((6, 16, 2, 64), 0, dtype),) * 2 if cache is None else cache
    return plan(x, **(changes or {})).run(b.full(q or (3, 4, 64), 0, dtype), cache, **options)


REFUSED = {
    "layout": (lambda x: plan(x, kv_layout="NDH"), ValueError, f"{OP}: kv_layout is no layout: got 'NDH'"),
    "profiler": (lambda x: plan(x, use_profiler=True), ValueError, "use_profiler is not available: got True, wanted False"),
    "heads": (lambda x: plan(x, num_qo_heads=5), ValueError, "num_qo_heads does not divide among the kv heads"),
    "page size": (lambda x: plan(x, page_size=0), ValueError, "page_size is no page size: got 0"),
    "soft cap": (lambda x: plan(x, logits_soft_cap=-1.0), ValueError, "logits_soft_cap is no soft cap: got -1.0"),
    "qo_indptr": (lambda x: plan(x, qo_indptr=[0, 2, 1]), ValueError, "qo_indptr decreases: got 1 at entry 2"),
    "kv_indptr": (lambda x: plan(x, kv_indptr=[1, 2, 3]), ValueError, "kv_indptr does not start at 0: got 1"),
    "batch": (lambda x: plan(x, qo_indptr=[0, 1]), ValueError, r"qo_indptr is for another batch size: got 1, wanted 2 \(kv_indptr has 3 entries\)"),
    "lengths": (lambda x: plan(x, kv_len_arr=[19]), ValueError, "kv_len_arr is for another batch size: got 1, wanted 2"),
    "too long": (lambda x: plan(x, kv_len_arr=[33, 16]), ValueError, r"kv_len_arr does not fit the page table: got 33 for request 0, wanted 0\.\.32 \(2 pages\)"),
    "negative": (lambda x: plan(x, kv_len_arr=[3, -1]), ValueError, "kv_len_arr does not fit the page table: got -1 for request 1"),
    "indices": (lambda x: plan(x, kv_indices=[4, 0]), ValueError, r"kv_indices is too short: got 2, wanted at least 3 \(kv_indptr\[-1\]\)"),
    "negative page": (lambda x: plan(x, kv_indices=[4, -2, 5]), ValueError, "kv_indices holds a negative page: got -2 at entry 1"),
    "run first": (lambda x: pyinfer.BatchAttention().run(1, 2), ValueError, rf"{OP}: plan\(\) was not called: got run\(\) first"),
    "run profiler": (lambda x: run(x, profiler_buffer=1), ValueError, "profiler_buffer is not available: got int, wanted None"),
    "other cap": (lambda x: run(x, logits_soft_cap=5.0), ValueError, r"logits_soft_cap differs from the plan: got 5.0, wanted 0 or 0.0 \(the plan's\)"),
    "q": (lambda x: run(x, q=(2, 4, 64)), ValueError, r"BatchAttention: q has the wrong shape: got \(2, 4, 64\), wanted \(3, 4, 64\)"),
    "cache": (lambda x: run(x, cache=(x[0].full((6, 8, 2, 64), 0, x[1]),) * 2), ValueError, r"\(K\) has the wrong shape: got \(6, 8, 2, 64\), wanted \(any, 16, 2, 64\)"),
    "page outside": (lambda x: run(x, {"kv_indices": [4, 6, 5]}), ValueError, r"indices names a page outside the cache: got 6, wanted 0\.\.5"),
    "out": (lambda x: run(x, out=x[0].full((3, 4, 32), 0, x[1])), ValueError, r"out has the wrong shape: got \(3, 4, 32\), wanted \(3, 4, 64\)"),
    "lse": (lambda x: run(x, lse=x[0].full((6, 4), 0, "float32")[::2]), ValueError, r"lse is not contiguous: got strides \(8, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend_arrays, device, name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call((backend_arrays, cases.dtypes(device)[0]))
