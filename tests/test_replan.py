"""replan(): decode follows lengths that change where they lie. The result has the bits of a plan() for the same lengths."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer import _replan as replan_module
from pyinfer.decode import CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from pyinfer.jit import replan as jit
from pyinfer.schedulers import _kernels
from tests import attention_cases as cases
from tests import stub_driver
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.attention_cases import Shape


class Tables:
    """A wrapper's buffers, each request with room for `room` pages of its own: kv_indptr stays, lengths change."""

    def __init__(self, rng: np.random.Generator, b: Backend, batch: int, room: int, page_size: int) -> None:
        self.b, self.batch, self.room, self.page_size = b, batch, room, page_size
        pages = batch * room
        self.order = rng.permutation(pages).astype(np.int32)
        # Behind every request's pages lies -1: what is not needed must not be looked at.
        self.buffers = [b.array(np.full(n, -1), "int32") for n in (batch + 1, pages, batch)]
        self.wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(b.array(np.zeros(32 << 20, np.uint8)), *self.buffers)
        self.kv_len = b.array(np.zeros(batch), "int32")

    def compact(self, lens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The page table in CSR form as plan() takes it."""
        pages = -(-lens // self.page_size)
        indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        rows = [self.order[i * self.room : i * self.room + n] for i, n in enumerate(pages)]
        last = np.where(lens > 0, (lens - 1) % self.page_size + 1, 0).astype(np.int32)
        return indptr, np.concatenate(rows).astype(np.int32), last

    def _put(self, tensor, values: np.ndarray) -> None:
        tensor[: len(values)] = self.b.array(values, "int32")

    def write(self, lens: np.ndarray, reserved: bool) -> None:
        """New contents: with `reserved`, kv_len and pages at fixed places, else a compact table."""
        if reserved:
            table = np.full((self.batch, self.room), -1)
            for i, n in enumerate(-(-lens // self.page_size)):
                table[i, :n] = self.order[i * self.room : i * self.room + n]
            self._put(self.buffers[0], np.arange(self.batch + 1) * self.room)
            self._put(self.buffers[1], table.reshape(-1))
            self._put(self.kv_len, lens)
        else:
            for buffer, values in zip(self.buffers, self.compact(lens), strict=True):
                self._put(buffer, values)


def random_lens(rng: np.random.Generator, i: int, batch: int, most: int) -> np.ndarray:
    """Even, uneven, all empty, one long among many short."""
    if i % 4 == 0:
        return rng.integers(0, most + 1, batch)
    if i % 4 == 1:
        return np.full(batch, int(rng.integers(0, most + 1)))
    if i % 4 == 2:
        return rng.permutation([most] + [int(rng.integers(0, min(20, most) + 1))] * (batch - 1))
    return rng.integers(0, 2, batch) * rng.integers(1, most + 1, batch)


OPTIONS = ({}, {"window_left": 70}, {"fixed_split_size": 3}, {"disable_split_kv": True})


@pytest.mark.parametrize("i", range(len(OPTIONS)))
@pytest.mark.parametrize("reserved", [True, False])
def test_same_bits_as_a_plan(rng, backend_arrays, device, i, reserved):
    b, options, heads = backend_arrays, OPTIONS[i], (8, 2, 64)
    shape = Shape(cases.dtypes(device)[0], *heads, lens=(400,) * 5)
    t = Tables(rng, b, 5, 25, 16)
    eager = Tables(rng, b, 5, 25, 16).wrapper
    cache = b.array(rng.standard_normal((125, 2, 16, 2, 64)), shape.dtype)
    q = b.array(rng.standard_normal((5, 8, 64)), shape.dtype)
    t.wrapper.plan(*t.compact(np.full(5, 7)), *heads, 16, q_data_type=shape.dtype, **options)
    for step in range(8):
        lens = random_lens(rng, step, 5, 400)
        t.write(lens, reserved)
        t.wrapper.replan(t.kv_len if reserved else None)
        eager.plan(*t.compact(lens), *heads, 16, q_data_type=shape.dtype, **options)
        out = b.full((5, 8, 64), np.nan, shape.dtype)
        _, lse = t.wrapper.run(q, cache, out=out, return_lse=True)
        want, want_lse = eager.run(q, cache, return_lse=True)
        assert_same_bits(b.numpy(out), b.numpy(want), f"lengths {lens.tolist()}")
        assert_same_bits(b.numpy(lse), b.numpy(want_lse))
    k64, v64 = (b.float64(cache)[:, part] for part in (0, 1))
    pages = [t.order[i * 25 : i * 25 + -(-n // 16)] for i, n in enumerate(lens)]
    dense = [[x[p].reshape(-1, 2, 64)[:n] for p, n in zip(pages, lens, strict=True)] for x in (k64, v64)]
    window = {k: v for k, v in options.items() if k == "window_left"}
    want64, _ = cases.expected(b.float64(q), (1,) * 5, *dense, **window)
    assert_close(b.float64(out), want64, **cases.tolerance(shape.dtype, device))


def test_costs_are_the_planners():
    assert (jit.ITEM_COST, jit.MERGE_COST) == (_kernels.ITEM_COST, _kernels.MERGE_COST)


def device_plan(wrapper) -> np.ndarray:
    """A wrapper's plan as it lies on the device."""
    import cupy

    total = wrapper.plan_info.offsets.total
    memory = cupy.cuda.UnownedMemory(wrapper._plan_ptr, 4 * total, wrapper)
    return cupy.asnumpy(cupy.ndarray(total, cupy.int32, cupy.cuda.MemoryPointer(memory, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (16, 1), (64, 2), (100, 1)], ids=str)
def test_the_devices_plan_is_the_hosts(rng, backend_arrays, heads, monkeypatch):
    """Header, work list, page table and lengths, int by int, over batches of 1 to 150 requests of up to 100,000 tokens."""
    monkeypatch.setattr(replan_module, "_listed", lambda *_: True)  # also where run() reads the lengths alone
    for i in range(40):
        batch, options = int(rng.integers(1, (4, 40, 150)[i % 3])), OPTIONS[i // 4 % 3]
        most = int(rng.integers(1, (30, 3000, 100_000)[i % 3] if batch < 40 else 3000))
        room = -(-most // 16)
        if "fixed_split_size" in options:
            options = {"fixed_split_size": int(rng.integers(max(batch * room // 300, 1), room + 2))}
        t = Tables(rng, backend_arrays, batch, room, 16)
        t.wrapper.plan(*t.compact(np.full(batch, 1)), *heads, 64, 16, **options)
        for step in range(4):
            lens = random_lens(rng, step, batch, most)
            reserved = bool(step % 2)
            t.write(lens, reserved)
            t.wrapper.replan(t.kv_len if reserved else None)
            got = device_plan(t.wrapper)
            t.wrapper.plan(*t.compact(lens), *heads, 64, 16, **options)
            want = t.wrapper.plan_info.pack().copy()
            if reserved:
                at = t.wrapper.plan_info.offsets.kv_indptr
                want[at : at + batch + 1] = np.arange(batch + 1) * room
            assert_same_bits(got, want, f"batch {batch}, lengths {lens.tolist()}, {options}")


@pytest.mark.gpu
def test_a_captured_loop_grows_without_the_host(rng, backend_arrays):
    """One graph lengthens every request, schedules and decodes; nothing but replays between steps, through page borders and new splits."""
    import torch

    b, heads, batch, room = backend_arrays, (8, 2, 128), 6, 40
    t, eager = Tables(rng, b, batch, room, 16), Tables(rng, b, batch, room, 16).wrapper
    lens = np.array([0, 1, 15, 16, 300, 37])
    cache = torch.randn(batch * room, 2, 16, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.randn(batch, 8, 128, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    t.wrapper.plan(*t.compact(lens), *heads, 16)
    t._put(t.buffers[0], np.arange(batch + 1) * room)
    t._put(t.buffers[1], t.order)
    t._put(t.kv_len, lens)
    step = b.array([1, 3, 1, 1, 5, 2], "int32")

    def loop():
        t.kv_len.add_(step)
        t.wrapper.replan(t.kv_len)
        t.wrapper.run(q, cache, out=out)

    loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    lens = lens + b.numpy(step)
    for i in range(60):
        lens = lens + b.numpy(step)
        q.copy_(torch.randn_like(q))
        out.fill_(float("nan"))
        graph.replay()
        eager.plan(*t.compact(lens), *heads, 16)
        assert_same_bits(b.numpy(out), b.numpy(eager.run(q, cache)), f"step {i}, lengths {lens.tolist()}")


@pytest.mark.gpu
def test_nonsense_stays_inside_the_buffers(rng, backend_arrays, monkeypatch):
    """Lengths and page ranges that cannot be: the plan is that of lengths cut down to the buffers, never beyond the capacity."""
    monkeypatch.setattr(replan_module, "_listed", lambda *_: True)
    b = backend_arrays
    t = Tables(rng, b, 4, 8, 16)
    t.wrapper.plan(*t.compact(np.full(4, 100)), 8, 2, 64, 16)
    t._put(t.buffers[0], np.array([-5, 8, 4, 1000, 2**31 - 1]))
    for lens in ([-1, 2**31 - 1, 17, 5], [10, 10, 2**30, 2**31 - 1]):
        t._put(t.kv_len, np.array(lens))
        t.wrapper.replan(t.kv_len)
        plan = t.wrapper.plan_info
        got, at = device_plan(t.wrapper), plan.offsets
        indptr, kv_len = got[at.kv_indptr : at.kv_indptr + 5], got[at.kv_len : at.kv_len + 4]
        assert indptr.tolist() == [0, 8, 4, 32, 32]
        room = np.array([8, 0, 28, 0]) * 16
        assert kv_len.tolist() == np.clip(lens, 0, room).tolist()
        work = got[at.work : at.qo_indptr].reshape(-1, 8)[: got[0]]
        assert 0 < got[0] <= plan.capacity.max_work and got[1] <= plan.capacity.max_partials
        assert (work[:, 4] <= kv_len[work[:, 0]]).all() and (work[:, 3] >= 0).all()


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_ten_thousand_launches_give_the_same_bits(rng, backend_arrays):
    """The splits' semaphore: whichever block comes last, and whatever else runs on the GPU, the bits are those of the first launch."""
    import torch

    noise_stream = torch.cuda.Stream()
    noise = torch.randn(1 << 22, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    launches = 0
    for case in range(25):
        group, dim = (1, 4, 8, 7, 16)[case % 5], (64, 128)[case % 2]
        batch = int(rng.integers(1, 9))
        lens = random_lens(rng, case, batch, int(rng.integers(500, 6000)))
        indptr, indices, last, pages = cases.page_table(rng, lens, 16)
        cache = torch.randn(pages, 2, 16, 2, dim, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(batch, 2 * group, dim, dtype=torch.bfloat16, device="cuda")
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
        options = {"fixed_split_size": int(rng.integers(2, 12))} if case % 2 else {}
        wrapper.plan(indptr, indices, last, 2 * group, 2, dim, 16, q_data_type="bfloat16", **options)
        want, want_lse = (x.view(torch.int16) for x in wrapper.run(q, cache, return_lse=True))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
        for i in range(400):
            if i % 7 == case % 7:  # something else takes part of the GPU, so that blocks come and go in other orders
                with torch.cuda.stream(noise_stream):
                    noise.mul_(1.0001) if i % 2 else noise[: 1 << (i % 20)].add_(1.0)
            out.fill_(float("nan"))
            wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
            wrong += (out.view(torch.int16) != want).sum() + (lse.view(torch.int16) != want_lse).sum()
            launches += 1
    torch.cuda.synchronize()
    assert launches == 10_000 and int(wrong) == 0


def test_refusals(rng, backend_arrays, device):
    b = backend_arrays
    plain = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    with pytest.raises(ValueError, match=r"replan: use_cuda_graph is off: got False, wanted True. A wrapper without"):
        plain.replan()
    t = Tables(rng, b, 3, 4, 16)
    with pytest.raises(ValueError, match=r"replan: plan\(\) was not called: got replan\(\) first, wanted one plan\(\)"):
        t.wrapper.replan()
    dtype = cases.dtypes(device)[0]
    t.wrapper.plan(*t.compact(np.array([5, 6, 7])), 8, 2, 64, 16, q_data_type=dtype)
    with pytest.raises(TypeError, match=r"replan: kv_len has the wrong dtype: got int64, wanted int32"):
        t.wrapper.replan(b.array(np.zeros(3), "int64"))
    with pytest.raises(ValueError, match=r"replan: kv_len has the wrong shape: got \(4,\), wanted \(3\)"):
        t.wrapper.replan(b.array(np.zeros(4), "int32"))
    with pytest.raises(ValueError, match=r"replan: kv_len is not contiguous: got strides \(2,\)"):
        t.wrapper.replan(b.array(np.zeros(6), "int32")[::2])
    if device == "cuda":
        with pytest.raises(ValueError, match=r"replan: kv_len is on another device: got cpu, wanted cuda:0"):
            t.wrapper.replan(np.zeros(3, np.int32))


@pytest.mark.cpu
def test_malformed_buffers_on_the_cpu(rng, backend_arrays):
    b = backend_arrays
    t = Tables(rng, b, 3, 4, 16)
    t.wrapper.plan(*t.compact(np.array([5, 6, 7])), 8, 2, 64, 16, q_data_type="float32")
    before = t.wrapper.plan_info

    def refused(match: str, kv_len=None) -> None:
        with pytest.raises(ValueError, match=match):
            t.wrapper.replan(kv_len)
        assert t.wrapper.plan_info is before

    t.write(np.array([5, 6, 64]), reserved=True)
    wanted = r"kv_len is out of range: got 65 for request 1, wanted 0\.\.64 \(4 pages of 16\)"
    refused(wanted, b.array([5, 65, 3], "int32"))
    refused(r"kv_len is out of range: got -1 for request 0", b.array([-1, 65, 3], "int32"))
    refused(r"paged_kv_indices_buffer holds a negative page: got one below 0", b.array([17, 6, 3], "int32"))
    t._put(t.buffers[0], np.array([0, 4, 8, 13]))
    refused(r"paged_kv_indices_buffer is too short: got 12, wanted at least 13", b.array([1, 1, 1], "int32"))
    t._put(t.buffers[0], np.array([0, 4, 2, 12]))
    refused(r"paged_kv_indptr_buffer decreases", b.array([1, 1, 1], "int32"))
    refused(r"paged_kv_indptr decreases")


def test_a_capacity_can_be_too_large_for_the_kernel():
    from pyinfer.schedulers.decode import decode_capacity, decode_plan

    batch = 2049
    capacity = decode_capacity(batch, batch, num_qo_heads=1, num_kv_heads=1, page_size=1, tile_q=16, num_sms=1)
    ones = np.ones(batch, np.int32)
    plan = decode_plan(
        np.arange(batch + 1, dtype=np.int32), None, ones, num_qo_heads=1, num_kv_heads=1, head_dim_qk=64, page_size=1,
        tile_q=16, tile_kv=64, num_sms=1, capacity=capacity,
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"plan's capacity is too large to be scheduled on the device: got 2051 work items, wanted at most",
    ):
        jit.replan_spec("replan", plan)


@pytest.fixture
def stub(monkeypatch):
    """The launches of the GPU path on CPU tensors; the device is a Hopper GPU of 132 multiprocessors."""
    pytest.importorskip("torch")
    from pyinfer import decode
    from pyinfer.core import device
    from pyinfer.jit import attention_launch as launch
    from tests import stub_runtime

    caches = (
        decode._shape, launch.device_config, launch.device_wide_config, launch.hopper_config, launch.prepare_attention, launch._planned, launch._kernel,
        replan_module._kernel,
    )  # fmt: skip
    _, launches = stub_runtime.install(monkeypatch)
    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    for cache in caches:
        cache.cache_clear()
    yield launches
    for cache in caches:
        cache.cache_clear()


@pytest.mark.cpu
@pytest.mark.parametrize("listed", [True, False])
def test_what_is_launched(stub, rng, backend_arrays, monkeypatch, listed):
    """The scheduling kernel gets the caller's buffers and the sections of the plan, on the caller's stream, one block, with the plan's numbers.

    Three short requests are run by clusters, which read lengths and no list.
    """
    b = backend_arrays
    if listed:
        monkeypatch.setattr(replan_module, "_listed", lambda *_: True)
    t = Tables(rng, b, 3, 10, 16)
    t.wrapper.plan(*t.compact(np.array([5, 60, 160])), 8, 2, 128, 16, q_data_type="bfloat16", window_left=40)
    for kv_len in (None, t.kv_len):
        stub.clear()
        t.wrapper.replan(kv_len)
        ((name, grid, params, stream, _),) = stub
        plan, at = t.wrapper.plan_info, t.wrapper.plan_info.offsets
        values = stub_driver.fields(jit.REPLAN, params)
        assert (name, grid, stream) == ("decode_replan_512", (1, 1, 1), 77)
        assert values["plan"] == t.wrapper._plan_ptr and values["kv_len"] == (
            0 if kv_len is None else kv_len.data_ptr()
        )
        assert [values[x] for x in ("kv_indptr", "last_page_len")] == [t.buffers[0].data_ptr(), t.buffers[2].data_ptr()]
        assert [values[x] for x in ("at_work", "at_kv_indptr", "at_kv_len")] == [at.work, at.kv_indptr, at.kv_len]
        counts = [values[x] for x in ("max_work", "batch", "max_pages", "page_size", "rows", "tile_q", "window_left")]
        assert counts == [plan.capacity.max_work if listed else 0, 3, 30, 16, 4, 16, 40]
        # two blocks on each of 132 multiprocessors, shared by two heads
        assert [values[x] for x in ("unit", "slots", "extra_items", "chunk")] == [64, 132, 264, -1]


@pytest.mark.cpu
def test_few_requests_take_the_wide_kernel(stub, rng, backend_arrays):
    """From half a block to one for each multiprocessor, and the plan is cut for the kernel that runs it. (Fewer than 4 requests take clusters.)"""
    b = backend_arrays
    for batch, wide in ((4, False), (8, False), (9, True), (16, True), (17, False)):
        t = Tables(rng, b, batch, 70, 16)
        t.wrapper.plan(*t.compact(np.full(batch, 1100)), 32, 8, 128, 16, q_data_type="float16")
        q, cache = b.full((batch, 32, 128), 0, "float16"), b.full((1, 2, 16, 8, 128), 0, "float16")
        t.wrapper._plan.__dict__["max_page"] = 0  # a cache of one page will do: nothing runs
        stub.clear()
        t.wrapper.run(q, cache)
        ((name, *_),) = stub
        assert name.endswith("_w8_c1_s3_qreg" if wide else "_w4_c2_s3_qreg")
        plan = t.wrapper.plan_info
        assert plan.shape.numbers[3:5].tolist() == ([128, 16] if wide else [64, 33])
        assert batch != 16 or (plan.n_work, plan.num_partials) == (16, 0)  # one round, nothing to merge
