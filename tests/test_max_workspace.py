"""max_workspace: a bound on what plans need, before there is one."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests import stub_runtime

pytestmark = pytest.mark.cpu
HEADS = (8, 2, 64)
PAGE = 16


@pytest.fixture(params=["cpu", "cuda"])
def where(request, monkeypatch):
    """The CPU, and a GPU of 132 multiprocessors on host memory."""
    if request.param == "cuda":
        stub_runtime.install(monkeypatch)
    return request.param


def draw(rng, batch, pages):
    """Lengths of at most `batch` requests on at most `pages` pages: some empty, one often long."""
    n = int(rng.integers(1, batch + 1))
    share = rng.dirichlet(np.full(n, 0.2)) * rng.integers(1, pages + 1)
    counts = np.floor(share).astype(np.int32)
    last = np.where(counts > 0, rng.integers(1, PAGE + 1, n), 0).astype(np.int32)
    return np.r_[0, np.cumsum(counts)].astype(np.int32), last


def home(wrapper, where):
    from pyinfer.core.dtypes import FLOAT16
    from pyinfer.core.tensor import TensorView

    if where == "cuda":
        wrapper._ref = TensorView(None, 0, (), (), FLOAT16, 0, "torch")
    return wrapper


@pytest.mark.parametrize("splits", [{}, {"fixed_split_size": 5}, {"disable_split_kv": True}], ids=str)
def test_decode(rng, where, splits):
    for batch, pages in ((1, 400), (7, 90), (40, 2000)):
        bound = pyinfer.BatchDecodeWithPagedKVCacheWrapper.max_workspace(
            batch, pages, *HEADS, PAGE, device=where, **splits
        )
        needs = []
        for _ in range(12):
            indptr, last = draw(rng, batch, pages)
            wrapper = home(pyinfer.BatchDecodeWithPagedKVCacheWrapper(), where)
            wrapper.plan(indptr, np.zeros(indptr[-1], np.int32), last, *HEADS, PAGE, **splits)
            needs.append(wrapper.plan_info.workspace_bytes)
        assert max(needs) <= bound
        assert (bound == 0) == ("disable_split_kv" in splits)


@pytest.mark.parametrize("splits", [{}, {"fixed_split_size": 5}, {"disable_split_kv": True}], ids=str)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "ragged"])
def test_prefill(rng, where, paged, splits):
    cls = pyinfer.BatchPrefillWithPagedKVCacheWrapper if paged else pyinfer.BatchPrefillWithRaggedKVCacheWrapper
    if not paged and "fixed_split_size" in splits:
        splits = {"fixed_split_size": 5 * PAGE}
    for batch, tokens, pages in ((1, 300, 400), (7, 20, 90), (30, 900, 1000)):
        kv = pages if paged else pages * PAGE
        bound = cls.max_workspace(batch, tokens, kv, *HEADS, *((PAGE,) if paged else ()), device=where, **splits)
        needs = []
        for causal in (False, True) * 5:
            indptr, last = draw(rng, batch, pages)
            n = len(last)
            qo = np.floor(rng.dirichlet(np.full(n, 0.3)) * rng.integers(1, tokens + 1)).astype(np.int32)
            qo_indptr = np.r_[0, np.cumsum(qo)].astype(np.int32)
            wrapper = home(cls(), where)
            if paged:
                wrapper.plan(
                    qo_indptr, indptr, np.zeros(indptr[-1], np.int32), last, *HEADS, PAGE, causal=causal, **splits
                )
            else:
                wrapper.plan(qo_indptr, indptr * PAGE, *HEADS, causal=causal, **splits)
            needs.append(wrapper.plan_info.workspace_bytes)
        assert max(needs) <= bound


def test_graph_mode(rng, where):
    """There the capacity decides, not the batch: every plan needs the same, within the bound."""
    import torch

    batch, pages = 9, 300
    sizes = {"indptr": batch + 1, "indices": pages, "last_page_len": batch}
    buffers = {f"paged_kv_{k}_buffer": torch.zeros(n, dtype=torch.int32) for k, n in sizes.items()}
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, **buffers)
    bound = pyinfer.BatchDecodeWithPagedKVCacheWrapper.max_workspace(batch, pages, *HEADS, PAGE, device=where)
    needs = set()
    for counts in ([1] * 9, [0] * 8 + [300], [20] * 9):
        indptr = np.r_[0, np.cumsum(counts)].astype(np.int32)
        wrapper.plan(indptr, np.zeros(indptr[-1], np.int32), np.minimum(counts, 1), *HEADS, PAGE)
        needs.add(wrapper.plan_info.workspace_bytes)
    assert len(needs) == 1 and 0 < needs.pop() <= bound


def test_errors():
    decode, prefill = pyinfer.BatchDecodeWithPagedKVCacheWrapper, pyinfer.BatchPrefillWithPagedKVCacheWrapper
    with pytest.raises(
        ValueError,
        match=r"BatchDecodeWithPagedKVCacheWrapper.max_workspace: max_batch_size is no size: got 0, wanted 1 or more",
    ):
        decode.max_workspace(0, 1, *HEADS, PAGE)
    with pytest.raises(ValueError, match=r"max_num_pages is no size: got 1\.5"):
        prefill.max_workspace(1, 1, 1.5, *HEADS, PAGE)
    with pytest.raises(ValueError, match="max_kv_tokens is no size: got -1"):
        pyinfer.BatchPrefillWithRaggedKVCacheWrapper.max_workspace(1, 1, -1, *HEADS)
    with pytest.raises(ValueError, match="num_qo_heads does not divide"):
        decode.max_workspace(1, 1, 5, 2, 64, PAGE, device="cpu")
    with pytest.raises(TypeError, match="has no CPU kernel: got float64"):
        prefill.max_workspace(1, 1, 1, *HEADS, PAGE, q_data_type="float64", device="cpu")
    with pytest.raises(ValueError, match="support: device is no device: got 'tpu'"):
        decode.max_workspace(1, 1, *HEADS, PAGE, device="tpu")
