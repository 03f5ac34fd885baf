"""Prefill of one batch and decode of another together, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests import stub_driver
from tests.arrays import assert_close, assert_same_bits
from tests.attention_cases import Shape

OP = "BatchPODWithPagedKVCacheWrapper"
QO = (20, 1, 0, 70)


class Batches:
    """A batch to prefill and one to decode, with caches of their own."""

    def __init__(
        self,
        rng,
        b,
        device,
        heads=(8, 2),
        dim=64,
        page=16,
        layout="NHD",
        lens=(45, 1, 9, 90),
        decode_lens=(1, 0, 300, 17),
    ):
        self.b, self.device, self.dtype = b, device, cases.dtypes(device)[0]
        hq, hk = heads
        shapes = [Shape(self.dtype, hq, hk, dim, page, layout, lens=n) for n in (lens, decode_lens)]
        self.p, self.d = (cases.paged_cache(rng, b, s) for s in shapes)
        self.q_p, self.q_d = (
            b.array(rng.standard_normal((n, hq, dim)), self.dtype) for n in (sum(QO), len(decode_lens))
        )
        self.dims = (hq, hk, dim, page)
        self.layout = layout

    def tables(self):
        rows = (QO, [1] * len(self.d.lens))
        for x, qo in zip((self.p, self.d), rows, strict=True):
            yield from (np.r_[0, np.cumsum(qo)].astype(np.int32), x.indptr, x.indices, x.last_page_len)

    def planned(self, workspace=None, **options):
        wrapper = pyinfer.BatchPODWithPagedKVCacheWrapper(workspace, self.layout)
        wrapper.plan(*self.tables(), *self.dims, **{"q_data_type": self.dtype, **options})
        return wrapper

    def run(self, wrapper, **options):
        return wrapper.run(self.q_p, self.p.cache, self.q_d, self.d.cache, **options)

    def check(self, got, decode_options=None, **options):
        b = self.b
        (out_p, out_d), (lse_p, lse_d) = got
        want = cases.expected(b.float64(self.q_p), QO, self.p.k, self.p.v, **options)
        plain = {k: v for k, v in options.items() if k in ("window_left", "sm_scale")}
        want_d = cases.expected(
            b.float64(self.q_d), [1] * len(self.d.lens), self.d.k, self.d.v, **{**plain, **(decode_options or {})}
        )
        for out, lse, (o, s) in ((out_p, lse_p, want), (out_d, lse_d, want_d)):
            assert b.is_own(out) and b.is_own(lse)
            assert_close(b.float64(out), o, **cases.tolerance(self.dtype, self.device))
            assert_close(b.float64(lse), s, **cases.lse_tolerance(self.device))


@pytest.mark.parametrize("i", range(4))
def test_batch_pod(rng, backend, device, i):
    """Causal and not, run after run: what run() says is planned for."""
    dim, heads, page = [(64, (8, 2), 16), (128, (4, 4), 1), (64, (32, 1), 3), (256, (6, 2), 16)][i]
    x = Batches(rng, backend, device, heads, dim, page, ("NHD", "HND")[i % 2])
    wrapper = x.planned()
    first = x.run(wrapper, causal_p=True, return_lse=True)
    x.check(first, causal=True)
    x.check(x.run(wrapper, return_lse=True))
    again = x.run(wrapper, causal_p=True)
    for one, two in zip(again, first[0], strict=True):
        assert_same_bits(backend.numpy(one), backend.numpy(two))


def test_options(rng, backend_arrays, device):
    b = backend_arrays
    x = Batches(rng, b, device)
    wrapper = x.planned(window_left=13, sm_scale=0.2)
    x.check(
        x.run(wrapper, causal_p=True, return_lse=True, k_scale=0.5, v_scale=2.0),
        {"sm_scale": 0.1, "v_scale": 2.0},
        causal=True,
        window_left=13,
        sm_scale=0.2,
    )
    alibi = x.planned(pos_encoding_mode="ALIBI")
    x.check(x.run(alibi, causal_p=True, return_lse=True), {"alibi": True}, causal=True, alibi=True)


def test_masks(rng, backend_arrays, device):
    """A mask replaces causality for the run that has it, and for no other."""
    b = backend_arrays
    x = Batches(rng, b, device)
    masks = [rng.random((n, m)) < 0.5 for n, m in zip(QO, x.p.lens, strict=True)]
    flat = b.array(np.concatenate([m.reshape(-1) for m in masks]))
    wrapper = x.planned()
    causal = x.run(wrapper, causal_p=True)
    got = x.run(wrapper, custom_mask_p=flat, causal_p=True, return_lse=True)
    row = 0
    for n, mask, k, v in zip(QO, masks, x.p.k, x.p.v, strict=True):
        want, want_lse = cases.attention(b.float64(x.q_p)[row : row + n], k, v, mask=mask)
        assert_close(b.float64(got[0][0])[row : row + n], want, **cases.tolerance(x.dtype, device))
        assert_close(b.float64(got[1][0])[row : row + n], want_lse, **cases.lse_tolerance(device))
        row += n
    sizes = [m.size for m in masks]
    packed, _ = pyinfer.segment_packbits(flat, np.r_[0, np.cumsum(sizes)], "little")
    assert_same_bits(b.numpy(x.run(wrapper, packed_custom_mask_p=packed)[0]), b.numpy(got[0][0]))
    assert_same_bits(b.numpy(x.run(wrapper, causal_p=True)[0]), b.numpy(causal[0]))


def test_long_requests_split(rng, backend_arrays, device):
    x = Batches(rng, backend_arrays, device, lens=(2000, 1, 9, 4000), decode_lens=(3000, 5, 1500, 0))
    for workspace in (None, backend_arrays.array(np.zeros(64 << 20, np.uint8))):
        wrapper = x.planned(workspace)
        for _ in range(3):  # semaphores are left as they were found
            x.check(x.run(wrapper, causal_p=True, return_lse=True), causal=True)


def test_plans_made_before_are_forgotten(rng, backend_arrays, device):
    x = Batches(rng, backend_arrays, device)
    wrapper = x.planned()
    x.run(wrapper, causal_p=True)
    y = Batches(rng, backend_arrays, device, lens=(30, 40, 1, 80), decode_lens=(9, 200))
    wrapper.plan(*y.tables(), *y.dims, q_data_type=y.dtype)
    y.check(y.run(wrapper, causal_p=True, return_lse=True), causal=True)


def test_errors(rng, backend_arrays, device):
    x = Batches(rng, backend_arrays, device)
    with pytest.raises(ValueError, match=rf"{OP}: plan\(\) was not called: got run\(\) first"):
        x.run(pyinfer.BatchPODWithPagedKVCacheWrapper())
    wrapper = x.planned()
    with pytest.raises(ValueError, match=f"{OP}: kv_layout is no layout: got 'NDH'"):
        pyinfer.BatchPODWithPagedKVCacheWrapper(None, "NDH")
    tables = list(x.tables())
    with pytest.raises(ValueError, match="qo_indptr decreases"):
        wrapper.plan(np.array([0, 20, 19, 20, 91], np.int32), *tables[1:], *x.dims, q_data_type=x.dtype)
    with pytest.raises(ValueError, match=r"plan\(\) was not called"):  # half a plan is none
        x.run(wrapper)
    small = backend_arrays.array(np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="float_workspace_buffer is too small: got 32 bytes"):
        y = Batches(rng, backend_arrays, device, (8, 1), decode_lens=(30000,))
        y.run(y.planned(small))
    with pytest.warns(DeprecationWarning, match=f"{OP}.begin_forward is deprecated; use plan"):
        wrapper.begin_forward(*tables, *x.dims, data_type=x.dtype)
    with pytest.warns(DeprecationWarning, match=f"{OP}.end_forward is deprecated"):
        wrapper.end_forward()
    assert not wrapper.is_cuda_graph_enabled and [p.batch_size for p in wrapper.plan_info] == [4, 4]


@pytest.mark.gpu
def test_one_launch(rng, backend_arrays, monkeypatch):
    x = Batches(rng, backend_arrays, "cuda")
    wrapper = x.planned()
    x.run(wrapper, causal_p=True)
    wrapper._calls.clear()
    names = stub_driver.names_of_launches(monkeypatch)
    x.run(wrapper, causal_p=True)
    assert len(names) == 1 and "pod" in names[0]
