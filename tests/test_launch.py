"""The one launch function and the library's device memory, on a GPU: grids, shared memory, clusters, dependent launches, threads, CUDA graphs, plan uploads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pyinfer.core.params import ParamStruct, i32, ptr
from pyinfer.jit import compiler
from pyinfer.jit.spec import JitSpec

pytestmark = pytest.mark.gpu

_PARAMS = ParamStruct("LaunchTest", ptr("out", "int32_t"), i32("n"), i32("value"), ptr("input", "const int32_t"))
_SOURCE = """#include "common/types.cuh"
{{ params }}
extern "C" __global__ void {{ kernel_name }}(const __grid_constant__ Params p) {
    extern __shared__ int32_t tile[];
    __shared__ int32_t fixed;  // static memory counts towards the limit that dynamic memory needs an opt-in for
{% if pdl %}
    asm volatile("griddepcontrol.wait;" ::: "memory");
{% endif %}
    int last = {{ smem }} / 4 - 1;  // touches the far end of the dynamic shared memory
    if (last > 0 && threadIdx.x == 0) tile[last] = p.value;
    if (threadIdx.x == 0) fixed = p.value;
    __syncthreads();
    int value = (last > 0 ? tile[last] : p.value) - p.value + fixed;
{% if cluster %}
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    value += static_cast<int>(rank);
{% endif %}
    int i = ((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.n) p.out[i] = (p.input ? p.input[i] : 0) + value;
}
"""


@pytest.fixture
def make_kernel(monkeypatch):
    """Builds and loads the test kernel with the given JitSpec fields."""
    original = compiler.read_source
    monkeypatch.setattr(
        compiler, "read_source", lambda name: _SOURCE if name == "launch_test.cu.jinja" else original(name)
    )
    compiler._template.cache_clear()
    count = [0]

    def make(**fields):
        count[0] += 1
        smem, cluster = fields.get("smem", 0), fields.get("cluster")
        pdl = fields.pop("pdl", False)
        name = f"launch_test_{count[0]}_{smem}_{'c' if cluster else ''}{'p' if pdl else ''}"
        return JitSpec(
            name, "launch_test.cu.jinja", _PARAMS, (("smem", smem), ("cluster", bool(cluster)), ("pdl", pdl)), **fields
        ).build_and_load()

    yield make
    compiler._template.cache_clear()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def _stream(torch):
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("grid", [1, 3, (2, 3, 1), (2, 2, 2)])
def test_grid_and_block(make_kernel, torch, grid):
    kernel = make_kernel(block=(64, 1, 1))
    n = 64 * int(np.prod(grid))
    out = torch.full((n + 8,), -1, dtype=torch.int32, device="cuda")
    kernel(_stream(torch), grid, (out.data_ptr(), n, 7, 0))
    assert out[:n].eq(7).all() and out[n:].eq(-1).all()


def test_empty_grid_launches_nothing(make_kernel, torch):
    out = torch.full((8,), -1, dtype=torch.int32, device="cuda")
    make_kernel()(_stream(torch), (0, 1, 1), (out.data_ptr(), 8, 7, 0))
    torch.cuda.synchronize()
    assert out.eq(-1).all()


@pytest.mark.parametrize("smem", [1024, 48 * 1024, 95 * 1024])
def test_dynamic_shared_memory(make_kernel, torch, smem):
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    make_kernel(smem=smem)(_stream(torch), 1, (out.data_ptr(), 128, 5, 0))
    assert out.eq(5).all()


def _native_hopper():
    from pyinfer.core.device import arch_number_of

    return arch_number_of(0) >= 90


def test_cluster(make_kernel, torch):
    if not _native_hopper():
        pytest.skip("clusters need code for 9.0")
    out = torch.zeros(4 * 128, dtype=torch.int32, device="cuda")
    make_kernel(cluster=(2, 1, 1))(_stream(torch), 4, (out.data_ptr(), out.numel(), 10, 0))
    assert out.view(4, 128)[:, 0].tolist() == [10, 11, 10, 11]


def test_dependent_launches_see_each_other(make_kernel, torch):
    """A chain of programmatic dependent launches, each reading what the one before wrote."""
    if not _native_hopper():
        pytest.skip("programmatic dependent launch needs code for 9.0")
    kernel = make_kernel(pdl=True)
    buffers = [torch.zeros(1 << 20, dtype=torch.int32, device="cuda") for _ in range(2)]
    for step in range(50):
        kernel(
            _stream(torch),
            (1 << 20) // 128,
            (buffers[1 - step % 2].data_ptr(), 1 << 20, 1, buffers[step % 2].data_ptr()),
            pdl=True,
        )
    assert buffers[0].eq(50).all()


def test_threads_launch_side_by_side(make_kernel, torch):
    """The packed parameters belong to the thread: another thread's launch must not overwrite them."""
    kernel = make_kernel()
    outs = [torch.zeros(200, 128, dtype=torch.int32, device="cuda") for _ in range(4)]
    errors = []

    def work(index):
        try:
            stream = torch.cuda.Stream()
            for row in range(200):
                kernel(stream.cuda_stream, 1, (outs[index][row].data_ptr(), 128, 1000 * index + row, 0))
            stream.synchronize()
        except Exception as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
    for i, out in enumerate(outs):
        want = 1000 * i + torch.arange(200, device="cuda", dtype=torch.int32)[:, None].expand(200, 128)
        assert out.equal(want.contiguous())


def test_graph_capture(make_kernel, torch):
    kernel = make_kernel()
    source = torch.zeros(128, dtype=torch.int32, device="cuda")
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    kernel(_stream(torch), 1, (out.data_ptr(), 128, 3, source.data_ptr()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(_stream(torch), 1, (out.data_ptr(), 128, 3, source.data_ptr()))
    for value in (10, 20):
        source.fill_(value)
        graph.replay()
        assert out.eq(value + 3).all()


def test_bad_launch_is_a_clear_error(make_kernel, torch):
    kernel = make_kernel()
    with pytest.raises(
        RuntimeError, match=r"launching launch_test_1_0_ with grid \(1, 70000, 1\).*CUDA_ERROR_INVALID_VALUE"
    ):
        kernel(_stream(torch), (1, 70000, 1), (0, 0, 0, 0))


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_plan_buffer(torch, framework, rng):
    """Uploads in quick succession arrive in order and whole, also when the buffer grows; capacity keeps the pointer."""
    import cupy

    from pyinfer.core.workspace import PlanBuffer

    buffer = PlanBuffer(0, framework)
    stream = _stream(torch)
    previous = 0
    for size in [5, 100, 3, 5000, 4999, 20000, 1]:
        data = rng.integers(-(2**31), 2**31 - 1, size, dtype=np.int32)
        pointer = buffer.upload(data, stream, capacity=32768)
        assert previous in (0, pointer)
        previous = pointer
        copies = [data]
        for _ in range(3):  # no synchronisation in between
            data = rng.integers(-(2**31), 2**31 - 1, size, dtype=np.int32)
            buffer.upload(data, stream, capacity=32768)
            copies.append(data)
        memory = cupy.cuda.UnownedMemory(pointer, 4 * size, buffer)
        got = cupy.ndarray((size,), np.int32, cupy.cuda.MemoryPointer(memory, 0))
        torch.cuda.synchronize()
        assert (cupy.asnumpy(got) == copies[-1]).all()


def test_first_touch_from_a_new_thread(make_kernel, torch):
    """A thread that never called into CUDA can launch."""
    kernel = make_kernel()
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    stream = _stream(torch)
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            kernel(stream, 1, (out.data_ptr(), 128, 9, 0))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures and out.eq(9).all()


def test_bound_launch(make_kernel, torch):
    """Only the leading pointer changes; streams may change too; each thread has buffers of its own."""
    kernel = make_kernel()
    bound = kernel.bind(1, (0, 128, 5, 0), 1)
    outs = torch.zeros(4, 128, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    bound(_stream(torch), outs[0].data_ptr())
    side = torch.cuda.Stream()
    bound(side.cuda_stream, outs[1].data_ptr())
    thread = threading.Thread(target=lambda: bound(side.cuda_stream, outs[2].data_ptr()))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert outs[:, 0].tolist() == [5, 5, 5, 0]
    kernel.bind((0, 1, 1), (0, 128, 5, 0), 1)(_stream(torch), outs[3].data_ptr())
    torch.cuda.synchronize()
    assert outs[3].eq(0).all()
    with pytest.raises(ValueError, match="only leading pointer fields"):
        kernel.bind(1, (0, 128, 5, 0), 2)
