"""BatchAttentionWithAttentionSinkWrapper, and fast_decode_plan: the batch wrappers by the names that serving engines use."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.arrays import assert_close, assert_same_bits
from tests.attention_cases import Shape
from tests.reference.attention import attention

OP = "BatchAttentionWithAttentionSinkWrapper"
QO = (3, 1, 20)


def inputs(rng, b, device, dtype):
    shape = Shape(dtype, 8, 2, 64, lens=(40, 17, 20), qo_lens=QO)
    paged = cases.paged_cache(rng, b, shape)
    q = b.array(rng.standard_normal((sum(QO), 8, 64)), dtype)
    sinks = rng.standard_normal(8).astype(np.float32)
    return paged, q, sinks, (np.r_[0, np.cumsum(QO)].astype(np.int32), paged.indptr, paged.indices, paged.last_page_len)


def expected(b, q, paged, sinks, **options):
    q64, outs, lses, row = b.float64(q), [], [], 0
    for n, k, v in zip(QO, paged.k, paged.v, strict=True):
        out, lse = attention(q64[row : row + n], k, v, sinks=sinks, **options)
        outs.append(out)
        lses.append(lse)
        row += n
    return np.concatenate(outs), np.concatenate(lses)


@pytest.mark.parametrize("window", [-1, 9])
def test_sinks(rng, backend, device, window):
    """As FlashInfer's users call it: dtypes and window in the constructor, sink and scale behind the cache."""
    b, dtype = backend, cases.dtypes(device)[0]
    paged, q, sinks, table = inputs(rng, b, device, dtype)
    wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper(
        None, "NHD", q_data_type=dtype, kv_data_type=dtype, head_dim_qk=64, head_dim_vo=64, window_left=window
    )
    wrapper.plan(*table, 8, 2, page_size=16, causal=True)
    assert wrapper.plan_info.window_left == window
    out, lse = wrapper.run(q, paged.cache, b.array(sinks), 0.2, return_lse=True)
    want, want_lse = expected(b, q, paged, sinks, causal=True, window_left=window, sm_scale=0.2)
    assert_close(b.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(b.float64(lse), want_lse, **cases.lse_tolerance(device))
    # The plan's scale where run() gets none; scales multiply what run() gets.
    wrapper.plan(*table, 8, 2, page_size=16, causal=True, sm_scale=0.1)
    assert_same_bits(
        b.numpy(wrapper.run(q, paged.cache, b.array(sinks), 0.1)), b.numpy(wrapper.run(q, paged.cache, b.array(sinks)))
    )
    doubled = wrapper.run(q, paged.cache, b.array(sinks), 0.1, q_scale=2.0)
    assert_same_bits(b.numpy(doubled), b.numpy(wrapper.run(q, paged.cache, b.array(sinks), 0.2)))


def test_plan_overrides_the_constructor(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    paged, q, sinks, table = inputs(rng, b, device, dtype)
    wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper()  # bfloat16, 128, no window
    wrapper.plan(
        *table,
        8,
        2,
        64,
        16,
        causal=True,
        window_left=4,
        q_data_type=dtype,
        o_data_type="float32",
        pos_encoding_mode="ALIBI",
    )
    out = wrapper.run(q, paged.cache, b.array(sinks))
    assert b.numpy(out).dtype == np.float32
    want, _ = expected(b, q, paged, sinks, causal=True, window_left=4, alibi=True)
    assert_close(b.float64(out), want, **{**cases.tolerance(dtype, device), "atol": 2e-6})
    with pytest.warns(DeprecationWarning, match=f"{OP}.forward is deprecated"):
        again = wrapper.forward(
            q, paged.cache, causal=True, pos_encoding_mode="ALIBI", window_left=4, sinks=b.array(sinks)
        )
    assert_same_bits(b.numpy(again), b.numpy(out))


def test_sink_errors(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    paged, q, sinks, table = inputs(rng, b, device, dtype)
    wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper(
        q_data_type=dtype, kv_data_type=dtype, head_dim_qk=64, head_dim_vo=64
    )
    with pytest.raises(
        TypeError, match=f"{OP}: sinks are missing: got None, wanted float32 .num_qo_heads.. Without sinks use Batch"
    ):
        wrapper.run(q, paged.cache)
    with pytest.raises(ValueError, match=rf"{OP}: plan\(\) was not called"):
        wrapper.run(q, paged.cache, b.array(sinks))
    wrapper.plan(*table, 8, 2, page_size=16)
    with pytest.raises(TypeError, match=r"\*args are not supported: got 1 extra arguments, wanted none"):
        wrapper.run(q, paged.cache, b.array(sinks), 0.1, 7)
    with pytest.raises(ValueError, match=r"sinks has the wrong shape: got \(7,\), wanted \(8\)"):
        wrapper.run(q, paged.cache, b.array(sinks[:7]))
    with pytest.raises(ValueError, match="pos_encoding_mode is no positional encoding: got 'LLAMA'"):
        pyinfer.BatchAttentionWithAttentionSinkWrapper(pos_encoding_mode="LLAMA")
    with pytest.raises(ValueError, match="window_left is no window: got -5"):
        pyinfer.BatchAttentionWithAttentionSinkWrapper(window_left=-5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        wrapper.plan(*table, 8, 2, page_size=16, head_size=64)


@pytest.mark.parametrize("page_size", [1, 16])
def test_fast_decode_plan(rng, backend_arrays, device, page_size):
    """Bound to a wrapper, as SGLang does; with indptr on the host besides the one on the device."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    shape = Shape(dtype, 8, 2, 64, page_size, lens=(40, 17, 0, 20), form="combined")
    paged = cases.paged_cache(rng, b, shape)
    q = b.array(rng.standard_normal((4, 8, 64)), dtype)
    plain = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    table = (paged.indptr, paged.indices, paged.last_page_len)
    if page_size == 1:
        table = (paged.indptr, paged.indices, np.where(np.diff(paged.indptr), 1, 0).astype(np.int32))
        paged_lens = (40, 17, 20)  # ones are assumed: a request without pages has none
        keep = [0, 1, 3]
        indptr = np.r_[0, np.cumsum(paged_lens)].astype(np.int32)
        table, q = (indptr, paged.indices, np.ones(3, np.int32)), q[keep]
    plain.plan(*table, 8, 2, 64, page_size, q_data_type=dtype)
    want = b.numpy(plain.run(q, paged.cache))
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.begin_forward = functools.partial(pyinfer.fast_decode_plan, wrapper)
    on_device = [b.array(x) for x in table]
    wrapper.begin_forward(
        *on_device, 8, 2, 64, page_size, data_type=dtype, fixed_split_size=-1, global_override_indptr_cpu=table[0]
    )
    assert_same_bits(b.numpy(wrapper.run(q, paged.cache)), want)
    wrapper.begin_forward(*table, 8, 2, 64, page_size, q_data_type=dtype, disable_split_kv=True)
    assert wrapper.plan_info.num_partials == 0
    wrapper.begin_forward(*table, 8, 2, 64, page_size)  # float16, as plan()
    assert wrapper._dtype.name == "float16"


@pytest.mark.gpu
def test_fast_decode_plan_does_not_wait(rng, backend_arrays):
    """Pages of one token and indptr on the host: nothing is read from the GPU."""
    import torch

    table = (np.array([0, 40, 57], np.int32), np.arange(57, dtype=np.int32), np.ones(2, np.int32))
    on_device = [backend_arrays.array(x) for x in table]
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pyinfer.fast_decode_plan(
                wrapper, *on_device, 8, 2, 64, 1, global_override_indptr_cpu=torch.from_numpy(table[0])
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert wrapper.plan_info.kv_len.tolist() == [40, 17]
