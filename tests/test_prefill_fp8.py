"""Prefill with queries, keys and values in float8_e4m3fn, against float64; what is refused; how the Hopper kernel is launched and compiled."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer._fp8_queries import split_scales
from pyinfer.core import tensormap
from pyinfer.core.dtypes import FLOAT8_E4M3, FLOAT8_E5M2
from pyinfer.core.imagined import Imagined
from pyinfer.core.tensor import view
from pyinfer.jit import attention_fp8 as fp8
from pyinfer.jit.attention_options import PLAIN, AttentionOptions
from tests import stub_driver
from tests.arrays import Backend, assert_same_bits, with_fp8
from tests.reference.attention_fp8 import attention_fp8

E4M3 = "float8_e4m3fn"
# Of a whole result, relative, in the Euclidean norm. The CPU's arithmetic is float32. Hopper's weights have 4 digits: rounding is at most 2^-4 of a weight,
# some 2.6% in the mean square, and independent from weight to weight.
ERROR = {"cpu": 2.0**-8, "cuda": 0.04}


@pytest.fixture
def arrays(backend, device) -> Backend:
    """The backend, where it has the kernel."""
    if device == "cuda":
        from pyinfer.core.device import arch_number_of

        if arch_number_of(0) != 90:
            pytest.skip("needs a Hopper GPU")
    return with_fp8(backend)


def draw(rng: np.random.Generator, arrays: Backend, *dims: int):
    x = arrays.array(rng.standard_normal(dims), E4M3)
    return x, arrays.float64(x)


def check(arrays: Backend, got, lse, want: np.ndarray, want_lse: np.ndarray) -> None:
    """The error of the whole, and the LSE row by row; rows without keys exactly."""
    out, lse = arrays.float64(got), arrays.float64(lse)
    assert np.isfinite(out).all()
    error = np.linalg.norm(out - want) / max(np.linalg.norm(want), 1e-30)
    assert error < ERROR[arrays.device], error
    blind = want_lse == -np.inf
    assert (out[blind] == 0).all() and (lse[blind] == -np.inf).all()
    assert np.abs(lse[~blind] - want_lse[~blind]).max(initial=0) < 0.02


def head_scales(rng: np.random.Generator, arrays: Backend, num_qo_heads: int, num_kv_heads: int):
    values = [rng.uniform(0.5, 2.0, n).astype(np.float32) for n in (num_qo_heads, num_kv_heads, num_kv_heads)]
    return [arrays.array(x) for x in values], values


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window_left": 70}, {"logits_soft_cap": 3.0}, {"causal": True, "logits_soft_cap": 5.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("heads", [False, True], ids=["scalars", "heads"])
def test_single(rng, arrays, device, options, heads):
    for qo_len, kv_len, hq, hk, dims in (
        (260, 333, 6, 2, (128, 128)),
        (7, 100, 4, 4, (64, 64)),
        (200, 130, 2, 1, (192, 128)),
        (129, 400, 4, 1, (256, 256)),
    ):
        if device == "cpu" and dims[0] > 128:
            continue
        (q, q64), (k, k64), (v, v64) = (
            draw(rng, arrays, *shape) for shape in ((qo_len, hq, dims[0]), (kv_len, hk, dims[0]), (kv_len, hk, dims[1]))
        )
        scales, values = head_scales(rng, arrays, hq, hk) if heads else ((0.5, 1.5, 3.0),) * 2
        out, lse = pyinfer.single_prefill_with_kv_cache(
            q, k, v, *scales, o_dtype="bfloat16", return_lse=True, **options
        )
        check(arrays, out, lse, *attention_fp8(q64, k64, v64, *values, **options))


@pytest.mark.parametrize("layout,page_size", [("NHD", 16), ("HND", 8), ("NHD", 24), ("HND", 64)])
def test_paged(rng, arrays, device, layout, page_size):
    hq, hk, dim = (8, 2, 128) if device == "cuda" else (4, 2, 64)
    qo_lens, kv_lens = [70, 0, 1, 200, 3], [200, 9, 130, 600, 3]
    pages = [-(-n // page_size) for n in kv_lens]
    indptr = np.array([0, *np.cumsum(pages)], np.int32)
    ids = rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(np.int32)
    shape = (int(indptr[-1]) + 2, *((page_size, hk) if layout == "NHD" else (hk, page_size)), dim)
    (k, k64), (v, v64) = draw(rng, arrays, *shape), draw(rng, arrays, *shape)
    q, q64 = draw(rng, arrays, sum(qo_lens), hq, dim)
    scales, values = head_scales(rng, arrays, hq, hk)
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, layout)
    at = np.array([0, *np.cumsum(qo_lens)], np.int32)
    last = np.array([(n - 1) % page_size + 1 for n in kv_lens], np.int32)
    wrapper.plan(at, indptr, ids, last, hq, hk, dim, page_size, causal=True, q_data_type=E4M3, o_data_type="float16")
    out, lse = wrapper.run(q, (k, v), *scales, return_lse=True)
    for b, n in enumerate(kv_lens):
        mine = ids[indptr[b] : indptr[b + 1]]
        k_b, v_b = (
            (x[mine] if layout == "NHD" else x[mine].swapaxes(1, 2)).reshape(-1, hk, dim)[:n] for x in (k64, v64)
        )
        rows = slice(at[b], at[b + 1])
        check(arrays, out[rows], lse[rows], *attention_fp8(q64[rows], k_b, v_b, *values, causal=True))
    for _ in range(2):
        assert_same_bits(arrays.numpy(wrapper.run(q, (k, v), *scales)), arrays.numpy(out), "the same again")


def test_ragged_and_splits(rng, arrays, device):
    """Requests without keys, splits, and what changes between runs of a plan: the scales, in numbers and in place."""
    hq, hk, dim = (4, 1, 128) if device == "cuda" else (4, 1, 64)
    qo_lens, kv_lens = [40, 5, 0, 100], [900, 0, 7, 300]
    q, q64 = draw(rng, arrays, sum(qo_lens), hq, dim)
    (k, k64), (v, v64) = (draw(rng, arrays, sum(kv_lens), hk, dim) for _ in range(2))
    qo, kv = (np.array([0, *np.cumsum(x)], np.int32) for x in (qo_lens, kv_lens))
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(qo, kv, hq, hk, dim, q_data_type=E4M3, o_data_type="bfloat16", fixed_split_size=256)
    scales, values = head_scales(rng, arrays, hq, hk)

    def expected(*with_scales):
        parts = [
            attention_fp8(q64[qo[b] : qo[b + 1]], k64[kv[b] : kv[b + 1]], v64[kv[b] : kv[b + 1]], *with_scales)
            for b in range(4)
        ]
        return np.concatenate([x for x, _ in parts]), np.concatenate([x for _, x in parts])

    check(arrays, *wrapper.run(q, k, v, *scales, return_lse=True), *expected(*values))
    check(arrays, *wrapper.run(q, k, v, *scales, return_lse=True), *expected(*values))
    scales[2] *= 2.0
    check(arrays, *wrapper.run(q, k, v, *scales, return_lse=True), *expected(values[0], values[1], 2 * values[2]))
    check(arrays, *wrapper.run(q, k, v, q_scale=0.5, v_scale=4.0, return_lse=True), *expected(0.5, 1.0, 4.0))
    one = arrays.array(np.array([[2.0]], np.float32))
    for _ in range(2):
        check(
            arrays,
            *wrapper.run(q, k, v, one, None, 3.0, return_lse=True),
            *expected(float(arrays.float64(one)[0, 0]), 1.0, 3.0),
        )
        one *= 0.5


def test_no_keys_and_sinks(rng, arrays):
    (q, q64), (k, k64), (v, v64) = (draw(rng, arrays, *shape) for shape in ((20, 4, 64), (50, 2, 64), (50, 2, 64)))
    out, lse = pyinfer.single_prefill_with_kv_cache(q, k[:0], v[:0], o_dtype="float16", return_lse=True)
    assert (arrays.float64(out) == 0).all() and (arrays.float64(lse) == -np.inf).all()
    sinks = rng.standard_normal(4).astype(np.float32)
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan([0, 20], [0, 50], 4, 2, 64, q_data_type=E4M3, o_data_type="float16")
    got = wrapper.run(q, k, v, sinks=arrays.array(sinks), return_lse=True)
    check(arrays, *got, *attention_fp8(q64, k64, v64, sinks=sinks))
    wrapper.plan([0, 20], [0, 0], 4, 2, 64, q_data_type=E4M3, o_data_type="float16")
    for _ in range(2):
        assert (arrays.float64(wrapper.run(q, k[:0], v[:0])) == 0).all()


# ---- what is refused -------------------------------------------------------------------------------------------------------------
def test_arguments(rng, backend):
    arrays = with_fp8(Backend(backend.framework, "cpu"))
    q, k, v = (draw(rng, arrays, *shape)[0] for shape in ((6, 4, 64), (9, 2, 64), (9, 2, 64)))
    other = arrays.array(np.ones((9, 2, 64)), "float8_e5m2")
    single = pyinfer.single_prefill_with_kv_cache
    with pytest.raises(TypeError, match="o_dtype is missing: got None, wanted float16 or bfloat16"):
        single(q, k, v)
    with pytest.raises(TypeError, match="o_dtype is no output dtype of queries in 8 bits: got float32"):
        single(q, k, v, o_dtype="float32")
    with pytest.raises(TypeError, match="k differs in dtype from q: got float8_e5m2, wanted float8_e4m3fn"):
        single(q, other, other, o_dtype="float16")
    two, four = (arrays.array(np.ones(n, np.float32)) for n in (2, 4))
    with pytest.raises(
        ValueError, match=r"scale_q has the wrong shape: got shape \(2,\), wanted \(4,\), one a head, or one element"
    ):
        single(q, k, v, two, o_dtype="float16")
    with pytest.raises(TypeError, match="scale_k"):
        single(q, k, v, None, arrays.array(np.ones(2), "float16"), o_dtype="float16")
    with pytest.raises(ValueError, match="scale_v is on another device: got cpu, wanted cuda:0"):
        split_scales("prefill", (None, None, two), view(Imagined((6, 4, 64), FLOAT8_E4M3, 0)), 2)
    with pytest.raises(ValueError, match="scale_v is not contiguous"):
        single(q, k, v, None, None, arrays.array(np.ones(4, np.float32))[::2], o_dtype="float16")
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
    plan = ([0, 6], [0, 9], 4, 2, 64)
    with pytest.raises(TypeError, match="o_data_type is missing"):
        wrapper.plan(*plan, q_data_type=E4M3)
    with pytest.raises(
        TypeError, match=r"kv_data_type differs from q_data_type: got float8_e5m2, wanted float8_e4m3fn \(q's\)"
    ):
        wrapper.plan(*plan, q_data_type=E4M3, kv_data_type="float8_e5m2", o_data_type="float16")
    wrapper.plan(*plan, q_data_type=E4M3, o_data_type="float16")
    with pytest.raises(
        TypeError,
        match=r"\*args are not the scales of the heads: got 1 extra arguments, wanted scale_q, scale_k and scale_v",
    ):
        wrapper.run(q, k, v, four)
    with pytest.raises(TypeError, match="q has no CPU kernel"):
        pyinfer.single_decode_with_kv_cache(q[0], k, v)


CASES = (
    ((96, 96, None, PLAIN), r"head_dim has no kernel for float8_e4m3fn queries: got 96 \(qk\), 96 \(vo\), wanted 64, 128, 256, 192 \(qk\) with 128"),
    ((128, 128, FLOAT8_E5M2, PLAIN), "k differs in dtype from float8_e4m3fn queries: got float8_e5m2"),
    ((128, 128, None, AttentionOptions(alibi=True, mask=True)), "q in float8_e4m3fn goes without some options: got ALIBI, a custom mask, wanted causality"),
    ((128, 128, None, AttentionOptions(rope=(1.0, 1e4), multi_item=True)), "got ROPE_LLAMA, multi-item scoring"),
    ((128, 128, None, AttentionOptions(family="sm80")), "got backend='fa2'"),
)  # fmt: skip


@pytest.mark.parametrize("case,message", CASES, ids=str)
def test_no_kernel(case, message):
    with pytest.raises(ValueError, match=message):
        fp8.check_case("prefill", *case)


@pytest.mark.cpu
def test_support(monkeypatch):
    """A GPU before Hopper is said to have no kernel, before anything is launched, and so are odd pages."""
    from pyinfer.core import device

    def asked(op="single_prefill_with_kv_cache", **config):
        return pyinfer.support(op, device="cuda:0", **config).reason

    dense = dict.fromkeys("qkv", (E4M3, (64, 8, 128)))
    monkeypatch.setattr(device, "arch_number_of", lambda index: 80)
    assert (
        "q in float8_e4m3fn has no kernel on this GPU: got compute capability 8.0, wanted Hopper (9.0). Convert q"
        in asked(**dense, o_dtype="float16")
    )
    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    assert asked(**dense, o_dtype="float16") == ""
    assert "has no kernel for float8_e4m3fn queries" in asked(
        **dict.fromkeys("qkv", (E4M3, (64, 8, 80))), o_dtype="float16"
    )
    with pytest.raises(
        ValueError,
        match="page_size is no multiple of 8: got 5, wanted a multiple of 8 tokens for float8_e4m3fn queries",
    ):
        fp8.check_pages("plan", 5)


# ---- the Hopper kernel, without a GPU ---------------------------------------------------------------------------------------------
@pytest.fixture
def hopper(monkeypatch):
    """cuda:0 is a Hopper GPU, and launches are recorded."""
    pytest.importorskip("torch")
    from pyinfer.core import device
    from pyinfer.jit import attention_fp8_launch, attention_launch

    submitted = stub_driver.install(monkeypatch)
    monkeypatch.setattr(
        tensormap, "encode", lambda address, dtype, *_: address.to_bytes(8, "little") + dtype.name.encode().ljust(120)
    )
    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    caches = (
        fp8.kernel_of, attention_fp8_launch.chosen, attention_fp8_launch._planned, attention_launch._arch_number, attention_launch.prepare_attention,
        tensormap.table,
    )  # fmt: skip
    for cache in caches:
        cache.cache_clear()
    yield submitted
    for cache in caches:
        cache.cache_clear()


def launched(submitted: list, params) -> dict:
    return stub_driver.fields(params, submitted.pop()[2])


def test_launch(hopper):
    import torch

    from pyinfer.jit.attention_launch import chosen_config, launch_attention, launch_single
    from pyinfer.jit.attention_options import AttentionExtras
    from pyinfer.schedulers.prefill import prefill_plan

    q, k, v = (
        torch.zeros(shape).to(torch.float8_e4m3fn) for shape in ((300, 8, 128), (40, 16, 2, 128), (40, 16, 2, 128))
    )
    out = torch.zeros(300, 8, 128, dtype=torch.bfloat16)
    config = chosen_config(0, FLOAT8_E4M3, 128, 128, 1000, None, PLAIN, 16)
    plan = prefill_plan(
        np.array([0, 100, 300], np.int32), np.array([0, 10, 30], np.int32), np.arange(30, dtype=np.int32), np.array([3, 8], np.int32),
        num_qo_heads=8, num_kv_heads=2, head_dim_qk=128, page_size=16, tile_q=config.tile_q, tile_kv=config.tile_kv, num_sms=132, ctas_per_sm=1, causal=True,
    )  # fmt: skip
    at = 1 << 20
    arguments = (
        0,
        7,
        at,
        plan,
        view(q),
        view(k),
        view(v),
        at + 4 * plan.offsets.kv_indices,
        "NHD",
        view(out),
        None,
        1 << 30,
    )
    launch_attention(*arguments, sm_scale=0.25, v_scale=3.0)
    found = launched(hopper, fp8.fp8_params("plan"))
    for name, x, kind in (("q", q, "float8"), ("k", k, "float8"), ("v", v, "float8"), ("o", out, "bfloat16")):
        assert found[f"{name}_map"][:8] == x.data_ptr().to_bytes(8, "little") and found[f"{name}_map"][8:].startswith(
            kind.encode()
        )
    assert found["logit_scale"] == pytest.approx(0.25 * np.log2(np.e)) and found["v_scale"] == 3.0
    assert (found["boxed"], found["heads_at_once"], found["box_rows"]) == (3, 2, 16)
    assert found["kv_indices"] == at + 4 * plan.offsets.kv_indices and found["plan_header"] == at

    extras = AttentionExtras(q_scales_ptr=64, v_scales_ptr=128)
    bound = launch_attention(*arguments, sm_scale=0.25, extras=extras, bind=True)
    bound(7, q.data_ptr(), k.data_ptr() + 4096, v.data_ptr(), out.data_ptr(), 0)
    found = launched(hopper, fp8.fp8_params("plan", PLAIN, True))
    assert (found["q_scales"], found["k_scales"], found["v_scales"]) == (64, 0, 128)
    assert found["k_map"][:8] == (k.data_ptr() + 4096).to_bytes(8, "little")

    none = torch.zeros(0, 2, 128).to(torch.float8_e4m3fn)
    launch_single(
        0,
        7,
        view(q),
        view(none),
        view(none),
        "NHD",
        view(out),
        None,
        1 << 30,
        causal=False,
        window_left=-1,
        sm_scale=1.0,
    )
    found = launched(hopper, fp8.fp8_params("single"))
    assert found["kv_len"] == 0 and found["k_map"][:8] == found["v_map"][:8] == q.data_ptr().to_bytes(8, "little")
    with pytest.raises(
        ValueError, match=r"q, k, v or out is not aligned: .* wanted addresses and strides in multiples of 16 bytes"
    ):
        odd = torch.zeros(50, 2, 136).to(torch.float8_e4m3fn)[..., :128]
        launch_single(
            0,
            7,
            view(q),
            view(odd),
            view(odd),
            "NHD",
            view(out),
            None,
            1 << 30,
            causal=False,
            window_left=-1,
            sm_scale=1.0,
        )
    with pytest.raises(ValueError, match="leaves no splits"):
        launch_attention(*arguments, sm_scale=0.25, extras=AttentionExtras(merge=False))
    with pytest.raises(ValueError, match="plan was made for another tile: got 128, wanted tile_q 64"):
        launch_attention(*arguments, sm_scale=0.25, config=fp8.candidates(128, 128, 64)[0])
    assert not hopper


def test_shared_memory_fits():
    for dims in fp8.HEAD_DIMS:
        for rows in (1, 64, 65, 128, 129, 1024):
            for config in fp8.candidates(*dims, rows):
                assert config.smem % 1024 == 0 and config.smem + 1024 <= 227 * 1024
                producer, consumer = config.registers
                assert 128 * producer + 128 * config.consumers * consumer <= 65536
                assert (
                    fp8.box_rows(config, 0) == config.tile_kv
                    and fp8.box_rows(config, 8) == 8
                    and fp8.box_rows(config, 12) == 0
                )
