"""Decode of few requests without a work list: which plans take it, what is launched, and on a GPU that results are those of the plan's list."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer.decode import CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from pyinfer.jit import attention, attention_config, attention_even, attention_launch
from tests import attention_cases as cases
from tests import stub_driver, stub_runtime
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.attention_cases import Shape


@pytest.fixture(autouse=True)
def no_stub_stays():
    """Kernels are cached by what they do, not by who built them: a stub's would serve the GPU tests behind it, and launch nothing."""
    yield
    for cached in (attention_launch._kernel, attention_launch._planned, attention_launch.prepare_attention):
        cached.cache_clear()


def launched(monkeypatch, lens: list[int], heads: tuple[int, int, int] = (32, 8, 128), page_size: int = 16, **options):
    """Plan and run a batch on the stub of an H200; returns (kernel name, grid, fields, table) of the launch."""
    torch = pytest.importorskip("torch")
    _, submitted = stub_runtime.install(monkeypatch)
    for cached in (attention_launch._kernel, attention_launch._planned, attention_launch.prepare_attention):
        cached.cache_clear()
    qo, kv, dim = heads
    pages = [-(-n // page_size) for n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = np.array([(n - 1) % page_size + 1 if n else 0 for n in lens], np.int32)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(32 << 20, dtype=torch.uint8))
    wrapper.plan(
        indptr, np.arange(sum(pages), dtype=np.int32), last, qo, kv, dim, page_size, q_data_type="bfloat16", **options
    )
    cache = torch.empty(max(sum(pages), 1), 2, page_size, kv, dim, dtype=torch.bfloat16)
    wrapper.run(torch.empty(len(lens), qo, dim, dtype=torch.bfloat16), cache)
    name, grid, data, *_ = submitted[-1]
    if "_even_" not in name:
        return name, grid[0], {}, []
    fields = stub_driver.fields(attention.attention_params("even", head_dim_qk=dim), data)
    return name, grid[0], fields, np.frombuffer(fields["table"], np.int32).tolist()


@pytest.mark.cpu
def test_short_requests_take_a_cluster_each(monkeypatch):
    name, grid, fields, table = launched(monkeypatch, [1000, 90])
    assert "_even_" in name and "_w4_" in name and name.endswith("_x8") and grid == 2 * 8 * 8
    at = fields["len_at"]
    assert table[:3] == [0, 63, 69] and table[at : at + 2] == [1000, 90]
    # One request of 8 heads leaves room for wider blocks, which read faster and start later.
    for length, warps in ((600, "_w4_"), (4096, "_w8_")):
        name, grid, _, _ = launched(monkeypatch, [length])
        assert warps in name and name.endswith("_x8") and grid == 8 * 8


@pytest.mark.cpu
@pytest.mark.parametrize("lens", [[16] * 3, [1024] * 16, [5] * attention_even.MOST_REQUESTS])
def test_unsplit_requests_take_a_block_each(monkeypatch, lens):
    name, grid, fields, table = launched(monkeypatch, lens)
    assert "_even_" in name and "_x8" not in name and grid == len(lens) * 8
    at = fields["len_at"]
    assert table[: len(lens) + 1] == [-(-lens[0] // 16) * i for i in range(len(lens) + 1)]
    assert table[at : at + len(lens)] == lens


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("lens", "options"),
    [
        ([32768], {}),  # more splits than a cluster has blocks
        ([16384, 20], {}),
        ([1024] * 4, {}),  # clusters would fill the device
        ([5] * (attention_even.MOST_REQUESTS + 1), {}),
        ([1024], {"fixed_split_size": 8}),
        ([1024], {"disable_split_kv": True}),
    ],
)
def test_other_plans_keep_their_list(monkeypatch, lens, options):
    name, *_ = launched(monkeypatch, lens, **options)
    assert "_plan_" in name


def captured(monkeypatch, lens: list[int], pages: int, heads: tuple[int, int, int] = (9, 3, 64)):
    """The launch of a wrapper in CUDA graph mode, whose buffers hold `pages` pages of 16: (kernel name, grid)."""
    torch = pytest.importorskip("torch")
    _, submitted = stub_runtime.install(monkeypatch)
    for cached in (attention_launch._kernel, attention_launch._planned, attention_launch.prepare_attention):
        cached.cache_clear()
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (len(lens) + 1, pages, len(lens))]
    wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8), *buffers)
    used = [-(-n // 16) for n in lens]
    indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    last = np.array([(n - 1) % 16 + 1 if n else 0 for n in lens], np.int32)
    qo, kv, dim = heads
    wrapper.plan(indptr, np.arange(sum(used), dtype=np.int32), last, qo, kv, dim, 16, q_data_type="bfloat16")
    cache = torch.empty(max(sum(used), 1), 2, 16, kv, dim, dtype=torch.bfloat16)
    wrapper.run(torch.empty(len(lens), qo, dim, dtype=torch.bfloat16), cache)
    return submitted[-1][0], submitted[-1][1][0]


@pytest.mark.cpu
def test_captured_launches_do_not_depend_on_the_lengths(monkeypatch):
    """A graph keeps its kernel: which one follows from the buffers alone, also where the first plan is of empty requests."""
    for lens in ([0, 0], [5, 0], [700, 900]):
        name, grid = captured(monkeypatch, lens, 512)
        assert "_even_plan_" in name and name.endswith("_x8") and grid == 2 * 3 * 8
        name, _ = captured(monkeypatch, lens, 16384)  # 262,144 keys, of one request perhaps
        assert "_even_" not in name and "_plan_" in name


def pieces_of(length: int, begin: int, pieces: int, unit: int) -> list[tuple[int, int]]:
    """What `even_work` computes, in its words."""
    each = (length - begin + pieces - 1) // pieces
    piece = length if pieces == 1 else (each + unit - 1) // unit * unit
    starts = [min(begin + rank * piece, length) for rank in range(pieces)]
    return [(start, min(start + piece, length)) for start in starts]


@pytest.mark.parametrize("pieces", [1, attention_config.CLUSTER])
def test_pieces_cover_the_keys(pieces):
    for length in (0, 1, 63, 64, 65, 511, 512, 513, 1024, 2047, 2048):
        for begin in (0, length // 3):
            cut = pieces_of(length, begin, pieces, 64)
            assert cut[0][0] == begin and cut[-1][1] == length
            assert all(a <= b for a, b in cut) and all(x[1] == y[0] for x, y in zip(cut, cut[1:], strict=False))
            assert all((b - a) % 64 == 0 for a, b in cut if b < length)


@pytest.mark.parametrize(("dim_qk", "dim_vo"), [(64, 64), (128, 128), (192, 128), (72, 200)])
def test_tasks_find_an_owner_with_room(dim_qk, dim_vo):
    """Every (row, 4 columns) has one owner, whose inbox holds it: the arithmetic of ClusterInbox."""
    row_tasks, most = dim_vo // 4, -(-16 * (dim_vo // 4) // attention_config.CLUSTER)
    for rows in range(1, 17):
        share = -(-rows * row_tasks // attention_config.CLUSTER)
        places = {(task // share, task % share) for task in range(rows * row_tasks)}
        assert len(places) == rows * row_tasks and share <= most
        assert max(owner for owner, _ in places) < attention_config.CLUSTER
    for config in attention_config.cluster_configs(90, dim_qk, dim_vo):
        alone = attention_config.decode_config(
            dim_qk, dim_vo, tile_kv=config.tile_kv, num_warps=config.num_warps, ctas_per_sm=1, stages=3
        )
        assert config.smem - alone.smem >= attention_config.CLUSTER * most * 24


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_clusters_compile_without_spills(arch):
    for dim in (64, 128):
        configs = attention_config.cluster_configs(int(arch[:-1]), dim, dim)
        assert len(configs) == 2
        for config in configs:
            used = attention.gen_attention(config, "bfloat16", dim, dim, "even", "softcap").build(arch).resources
            assert used.spill_stores == used.spill_loads == used.stack == 0


def run_batch(rng, b: Backend, shape: Shape, monkeypatch, listed: bool, paged, q, **run):
    """Results and LSE of a new wrapper; `listed`: by the plan's work list."""
    with monkeypatch.context() as m:
        if listed:
            m.setattr(attention_even, "choose", lambda *_: None)
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, shape.layout)
        wrapper.plan(
            paged.indptr, paged.indices, paged.last_page_len, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, shape.page_size,
            q_data_type=shape.dtype, **shape.options,
        )  # fmt: skip
        out = b.full((len(shape.lens), shape.num_qo_heads, shape.head_dim), np.nan, shape.dtype)
        _, lse = wrapper.run(q, paged.cache, out=out, return_lse=True, **run)
    return out, lse


CLUSTERED = (
    # lens, options, heads and dim, page size
    ((1024,), {}, (32, 8, 128), 16),
    ((1, 513), {"logits_soft_cap": 2.0}, (8, 2, 64), 1),
    ((2047, 0), {"window_left": 600}, (16, 1, 128), 3),
    ((700, 64, 65), {"sm_scale": -0.2}, (3, 3, 72), 16),
    ((300,), {"pos_encoding_mode": "ROPE_LLAMA"}, (4, 4, 128), 16),
    ((1500,), {"pos_encoding_mode": "ALIBI"}, (24, 2, 64), 16),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CLUSTERED)
def test_clusters_against_the_reference(rng, backend, device, case, monkeypatch):
    lens, options, (qo, kv, dim), page_size = case
    dtype = cases.dtypes(device)[int(rng.integers(2))]
    shape = Shape(
        dtype, qo, kv, dim, page_size, "HND" if kv == 2 else "NHD", lens=lens, qo_lens=(1,) * len(lens), options=options
    )
    paged = cases.paged_cache(rng, backend, shape)
    q = backend.array(rng.standard_normal((len(lens), qo, dim)), dtype)
    taken = []
    choose = attention_even.choose
    monkeypatch.setattr(attention_even, "choose", lambda *a: taken.append(choose(*a)) or taken[-1])
    sinks = backend.array(rng.standard_normal(qo), "float32") if dim == 64 else None
    out, lse = run_batch(rng, backend, shape, monkeypatch, False, paged, q, sinks=sinks)
    from pyinfer.core.device import arch_number_of

    assert any(e is not None and e.pieces == attention_config.CLUSTER for e in taken) == (90 <= arch_number_of(0) < 120)
    listed, listed_lse = run_batch(rng, backend, shape, monkeypatch, True, paged, q, sinks=sinks)
    tolerance = cases.tolerance(dtype, device)
    assert_close(backend.float64(out), backend.float64(listed), rtol=tolerance["rtol"], atol=1e-3, name=str(shape))
    assert_close(
        backend.float64(lse), backend.float64(listed_lse), **cases.lse_tolerance(device), name=f"lse of {shape}"
    )
    if "pos_encoding_mode" not in options and sinks is None:
        want, want_lse = cases.expected(backend.float64(q), shape.qo_lens, paged.k, paged.v, **options)
        assert_close(backend.float64(out), want, **tolerance, name=str(shape))
        assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device), name=f"lse of {shape}")


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(0, 1, 16, 60), (33,) * 20])
def test_unsplit_results_have_the_bits_of_the_list(rng, backend_arrays, device, lens, monkeypatch):
    b = backend_arrays
    shape = Shape(cases.dtypes(device)[0], 8, 2, 128, lens=lens, qo_lens=(1,) * len(lens), options={"window_left": 50})
    paged = cases.paged_cache(rng, b, shape)
    q = b.array(rng.standard_normal((len(lens), 8, 128)), shape.dtype)
    for got, want in zip(
        *(run_batch(rng, b, shape, monkeypatch, listed, paged, q) for listed in (False, True)), strict=True
    ):
        assert_same_bits(b.numpy(got), b.numpy(want))


@pytest.mark.gpu
def test_clusters_give_the_same_bits(rng, backend_arrays, device):
    """10,000 launches of 8 batches, in any order. (Splits that meet in global memory: test_replan.)"""
    b = backend_arrays
    batches = []
    for _ in range(8):
        lens = tuple(rng.integers(300, 2048, int(rng.integers(1, 4))).tolist())
        shape = Shape("bfloat16", 8, 2, 64, lens=lens, qo_lens=(1,) * len(lens))
        paged = cases.paged_cache(rng, b, shape)
        q = b.array(rng.standard_normal((len(lens), 8, 64)), shape.dtype)
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None)
        wrapper.plan(paged.indptr, paged.indices, paged.last_page_len, 8, 2, 64, 16, q_data_type=shape.dtype)
        assert wrapper.plan_info.num_partials
        first = wrapper.run(q, paged.cache)
        batches.append((wrapper, q, paged.cache, first, b.full(first.shape, np.nan, shape.dtype)))
    wrong = b.array(np.zeros(1), "int32")
    for _ in range(1250):
        for i in rng.permutation(len(batches)):
            wrapper, q, cache, first, out = batches[i]
            wrapper.run(q, cache, out=out)
            wrong += (out != first).any()
    assert int(b.numpy(wrong)[0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e6, 1e33])
def test_bf16_queries_of_8_bit_keys(rng, backend_arrays, device, magnitude):
    """Queries far outside of f16's range, in which they are multiplied: each row by its own power of two."""
    torch = pytest.importorskip("torch")
    q = torch.randn(2, 8, 128, device="cuda")
    q[:, ::2] *= 1e-3
    q = (q * magnitude).to(torch.bfloat16) if magnitude < 1e30 else (torch.sign(q) * magnitude).to(torch.bfloat16)
    k, v = (torch.randn(8, 16, 2, 128, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None)
    plan = np.array([0, 4, 8], np.int32), np.arange(8, dtype=np.int32), np.array([16, 5], np.int32)
    scale = 1.0 / (12.0 * magnitude)
    wrapper.plan(*plan, 8, 2, 128, 16, q_data_type="bfloat16", kv_data_type="float8_e4m3fn", sm_scale=scale)
    got = wrapper.run(q, (k, v)).double()
    for i, n in enumerate((64, 53)):
        keys, values = (x[4 * i : 4 * i + 4].double().flatten(0, 1)[:n].repeat_interleave(4, 1) for x in (k, v))
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[i].double(), keys) * scale, 1)
        want = torch.einsum("hn,nhd->hd", weights, values)
        assert (got[i] - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.cpu
def test_the_first_launch_behind_a_plan_does_not_start_early(monkeypatch):
    """Programmatic dependent launch orders kernels, and a plan comes by a copy."""
    torch = pytest.importorskip("torch")
    _, submitted = stub_runtime.install(monkeypatch)
    for cached in (attention_launch._kernel, attention_launch._planned, attention_launch.prepare_attention):
        cached.cache_clear()
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    table = np.array([0, 2], np.int32), np.arange(2, dtype=np.int32), np.array([5], np.int32)
    q, cache = torch.empty(1, 4, 64, dtype=torch.float16), torch.empty(2, 2, 16, 2, 64, dtype=torch.float16)
    early = []
    for _ in range(2):
        wrapper.plan(*table, 4, 2, 64, 16)
        for _ in range(4):
            submitted.clear()
            wrapper.run(q, cache)
            early.append(submitted[0][4])
    assert early == [0, 1, 1, 1] * 2  # attributes of the launch
