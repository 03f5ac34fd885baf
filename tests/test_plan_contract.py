"""What plan() promises: what it copies, what it waits for, whose memory it uses, what it costs."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

import pyinfer
from pyinfer import _attention, _batch_attention
from pyinfer.core.dtypes import UINT8
from pyinfer.core.tensor import TensorView
from pyinfer.schedulers.decode import decode_plan
from tests import attention_cases as cases
from tests.attention_cases import Shape

HEADS = (8, 2, 64, 16)  # query heads, kv heads, head dimension, page size


def table(batch: int, pages: int) -> tuple[np.ndarray, ...]:
    indptr = np.linspace(0, pages, batch + 1).astype(np.int32)
    rng = np.random.default_rng(0)
    return indptr, rng.permutation(pages).astype(np.int32), rng.integers(1, 17, batch).astype(np.int32)


def wrappers(workspace=None):
    return {
        "decode": pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace),
        "paged": pyinfer.BatchPrefillWithPagedKVCacheWrapper(workspace),
        "ragged": pyinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace),
    }


def plan(kind, wrapper, tables, **options):
    qo_indptr = np.arange(len(tables[0]), dtype=np.int32)
    if kind == "decode":
        wrapper.plan(*tables, *HEADS, **options)
    elif kind == "paged":
        wrapper.plan(qo_indptr, *tables, *HEADS, **options)
    else:
        wrapper.plan(qo_indptr, tables[0], *HEADS[:3], **options)


@pytest.fixture
def copies(monkeypatch):
    """The copies and waits that go through CuPy's runtime, as (name, direction)."""
    cupy = pytest.importorskip("cupy")
    runtime, seen = cupy.cuda.runtime, []

    def spy(name, direction_at):
        original = getattr(runtime, name)

        def call(*args):
            seen.append((name, args[direction_at] if direction_at is not None else None))
            return original(*args)

        monkeypatch.setattr(runtime, name, call)

    for name, direction_at in (
        ("memcpy", 3),
        ("memcpyAsync", 3),
        ("deviceSynchronize", None),
        ("streamSynchronize", None),
    ):
        spy(name, direction_at)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_host_metadata_costs_one_copy_and_no_wait(copies, kind):
    import torch

    workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    wrapper, tables = wrappers(workspace)[kind], table(20, 100)
    for _ in range(3):  # the first call compiles; the third uses the pinned buffer of the first
        torch.cuda.synchronize()
        copies.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan(kind, wrapper, tables, strict=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert copies == [("memcpyAsync", 1)]  # host to device


@pytest.mark.gpu
def test_device_metadata_costs_one_more_copy(copies):
    import torch

    wrapper, tables = pyinfer.BatchDecodeWithPagedKVCacheWrapper(), table(20, 100)
    on_device = [torch.from_numpy(x).cuda() for x in tables]
    fetched = []
    original = torch.Tensor.cpu
    torch.Tensor.cpu = lambda self, *args: (fetched.append(self.shape), original(self, *args))[1]
    try:
        wrapper.plan(*on_device, *HEADS)
        assert fetched == [(41,)]  # indptr and last_page_len together, the page indices not at all
        with pytest.raises(
            ValueError, match=r"indptr is on the GPU under strict=True: got cuda:0, wanted host metadata"
        ):
            wrapper.plan(*on_device, *HEADS, strict=True)
        assert fetched == [(41,)]
        wrapper.plan(tables[0], on_device[1], tables[2], *HEADS, strict=True)  # used where they are
    finally:
        torch.Tensor.cpu = original
    assert copies.count(("memcpyAsync", 1)) == 2
    long = [x.long() for x in on_device]
    wrapper.plan(*long, *HEADS)
    assert wrapper.plan_info.kv_indptr.tolist() == tables[0].tolist()


@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_strict_takes_host_metadata(rng, device, kind):
    import torch

    for convert in (lambda x: x, lambda x: x.tolist(), torch.from_numpy, lambda x: x.astype(np.int64)):
        wrapper = wrappers()[kind]
        plan(kind, wrapper, tuple(convert(x) for x in table(3, 7)), strict=True)
        assert wrapper.plan_info.batch_size == 3


def test_a_workspace_of_exactly_the_size(rng, backend_arrays, device):
    """One byte less is refused before anything is launched, with the size; the exact size is used, and found through any address."""
    b = backend_arrays
    shape = Shape(cases.dtypes(device)[0], 8, 2, 64, lens=(900, 3), qo_lens=(1, 1))
    paged = cases.paged_cache(rng, b, shape)
    tables = (paged.indptr, paged.indices, paged.last_page_len, *HEADS)
    options = {"q_data_type": shape.dtype, "fixed_split_size": 7}
    free = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    free.plan(*tables, **options)
    q = b.array(rng.standard_normal((2, 8, 64)), shape.dtype)
    want = b.numpy(free.run(q, paged.cache))
    need = free.plan_info.workspace_bytes
    assert need > 0
    big = b.array(np.zeros(need + 64, np.uint8))
    for begin in range(0, 20, 5):
        at = big.data_ptr() + begin
        exact = need + -at % 16
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(big[begin : begin + exact])
        wrapper.plan(*tables, **options)
        assert (b.numpy(wrapper.run(q, paged.cache)) == want).all()
        wrapper.reset_workspace_buffer(big[begin : begin + exact - 1])
        before = wrapper.plan_info
        with pytest.raises(ValueError, match=rf"is too small: got {exact - 1} bytes, wanted {exact} for this plan"):
            wrapper.plan(*tables, **options)
        assert wrapper.plan_info is before


@pytest.mark.cpu
def test_a_given_workspace_is_used(rng, backend_arrays):
    b = backend_arrays
    paged = cases.paged_cache(rng, b, Shape("float32", 8, 2, 64, lens=(900, 3)))
    workspace = b.array(np.full(1 << 22, 255, np.uint8))
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, *HEADS, q_data_type="float32", fixed_split_size=7)
    wrapper.run(b.array(rng.standard_normal((2, 8, 64)), "float32"), paged.cache)
    written = np.flatnonzero(b.numpy(workspace) != 255)
    assert written.size and written.max() < wrapper.plan_info.workspace_bytes + 16


@pytest.mark.cpu
@pytest.mark.parametrize(("batch", "pages", "limit"), [(256, 65536, 100e-6), (4096, 65536, 500e-6)])
def test_what_plan_costs(monkeypatch, batch, pages, limit):
    """The GPU path's host part, its configuration and upload faked. The bar is the H100 host's; a slower or busy machine gets four times that."""
    sent = []
    monkeypatch.setattr(_attention, "batch_tiles", lambda *args: (16, 64, 132, 2))
    monkeypatch.setattr(_batch_attention.BatchAttention, "_upload", lambda self, plan, *_: sent.append(plan.pack()))
    wrapper, tables = pyinfer.BatchDecodeWithPagedKVCacheWrapper(), table(batch, pages)
    wrapper._ref = TensorView(None, 0, (), (), UINT8, 0, "torch")
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        wrapper.plan(*tables, 32, 8, 128, 16)
        times.append(time.perf_counter() - begin)
    assert len(sent) == 60
    assert statistics.median(times) < 4 * limit, f"median {statistics.median(times) * 1e6:.0f} us"


def test_a_plan_can_be_copied_into_buffers(backend_arrays, device):
    """Into a host array, and into the int32 tensor of a captured graph."""
    made = decode_plan(
        *table(5, 17), num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, page_size=16, tile_q=16, tile_kv=64, num_sms=4
    )
    buffer = backend_arrays.array(np.full(made.offsets.total + 3, -7), "int32")
    made.copy_into(buffer)
    assert (backend_arrays.numpy(buffer)[:-3] == made.pack()).all() and (backend_arrays.numpy(buffer)[-3:] == -7).all()
    with pytest.raises(
        ValueError,
        match=rf"AttentionPlan.copy_into: buffer is too small: got 3 int32, wanted at least {made.offsets.total}",
    ):
        made.copy_into(buffer[:3])
    with pytest.raises(
        TypeError, match=r"AttentionPlan.copy_into: buffer has the wrong dtype: got int64, wanted int32"
    ):
        made.copy_into(backend_arrays.array(np.zeros(4), "int64"))
    with pytest.raises(ValueError, match=r"AttentionPlan.copy_into: buffer is not contiguous"):
        made.copy_into(buffer[::2])


@pytest.mark.gpu
def test_a_second_gpu(rng, backend_arrays):
    """Everything follows the tensors, whatever the current device is."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    shape = Shape("float16", 8, 2, 64, lens=(900, 3, 40), qo_lens=(1, 1, 1))
    paged = cases.paged_cache(rng, backend_arrays, shape)
    q = backend_arrays.array(rng.standard_normal((3, 8, 64)), "float16")
    mask = rng.random(943) < 0.5
    sinks = torch.randn(8)
    for name in ("cuda:0", "cuda:1"):
        cache, query = tuple(x.to(name) for x in paged.cache), q.to(name)
        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device=name))
        tables = [0, 1, 2, 3], paged.indptr, paged.indices, paged.last_page_len
        wrapper.plan(*tables, *HEADS, custom_mask=mask, disable_split_kv=True)
        out = wrapper.run(query, cache, sinks=sinks.to(name))
        single = pyinfer.single_decode_with_kv_cache(query[0], cache[0][0], cache[1][0])
        assert str(out.device) == name and torch.cuda.current_device() == 0
        results.append((out.cpu(), single.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
