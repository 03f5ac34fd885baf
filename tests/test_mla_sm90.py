"""The sm90 MLA kernel without a GPU: shared-memory layouts emulated from the CUDA source, the choice of the family, launches, and that it compiles."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import pyinfer
from pyinfer.core import tensormap
from pyinfer.core.dtypes import BFLOAT16, FLOAT16
from pyinfer.jit import mla, mla_sm90
from pyinfer.jit.compiler import render
from tests import stub_driver, stub_runtime
from tests.test_sm90_launch import fake_map
from tests.test_sm90_layout import Memory, expression, swizzle

SOURCES = Path(__file__).parent.parent / "cuda_src"
CONSTANTS = dict(BLOCK=64 * 128, HALF_BYTES=4 * 64 * 128, HALF=256, TILE_KV=64, CKV_STEPS=32)
SCALE = (128 + 64) ** -0.5


# ---- layouts ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source():
    text = render(mla_sm90.gen_mla_sm90(mla_sm90.MlaSm90Config(), "bfloat16"), "90a")
    for name in ("BLOCK", "HALF_BYTES"):
        assert expression(text, rf"constexpr int {name} = (.+?);")(**CONSTANTS) == CONSTANTS[name]
    return text


def descriptor(source, which, address):
    leading, stride = re.search(rf"{which} = wgmma_descriptor\(.+?, (\w+), (\w+)\)(?:;| \+ stage)", source).groups()
    leading, stride = (int(CONSTANTS.get(x, x)) for x in (leading, stride))
    return address >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 62


def load_tile(memory, base, values, rows):
    """Latent rows [64, 512] as the output warpgroups bring them: boxes of `rows` keys and 64 columns, two halves of four blocks."""
    for half in range(2):
        for block in range(4):
            for lane in range(64 // rows):
                at = base + half * CONSTANTS["HALF_BYTES"] + block * CONSTANTS["BLOCK"] + lane * rows * 128
                x = half * 256 + block * 64
                memory.tma(at, values[lane * rows : (lane + 1) * rows, x : x + 64])


def test_boxes_are_as_loaded_here(source):
    assert "const uint32_t rows = smem_address(smem.ckv[stage][half]) + role.box_offset();" in source
    assert "return threadIdx.x % 32 * p.box_rows * 128;" in source
    assert "tma_load_3d(rows + block * BLOCK, &p.ckv_map, full, half * HALF + block * 64, at.slot, at.page);" in source
    assert "for (int block = 0; block < HALF / 64; ++block) {" in source


@pytest.mark.parametrize("rows", [8, 64])
def test_keys_and_values_of_one_tile(source, rows):
    """The same bytes as operand B of both products: contiguous along the contraction for the scores, along the columns for the output."""
    key_step = expression(source, r"wgmma_scores\(score, q\[step\], k_tile \+ (\(.+?\) / 16), step > 0\)")
    last_step = expression(source, r"wgmma_scores\(score, q_last_tile, k_tile \+ (\(.+?\) / 16)\)")
    value_step = expression(source, r"wgmma_output\(out, a \+ .+?, v \+ (.+?)\);")
    base, memory = 3 * 1024, Memory(80 * 1024)
    values = np.arange(64 * 512).reshape(64, 512)
    load_tile(memory, base, values, rows)
    for step in range(32):
        k_tile = descriptor(source, "k_tile", base)
        at = k_tile + (key_step(step=step, **CONSTANTS) if step < 31 else last_step(**CONSTANTS))
        found = np.array([[memory.read(at, n, k, False) for k in range(16)] for n in range(64)])
        np.testing.assert_array_equal(found, values[:, step * 16 : step * 16 + 16])
    for half in range(2):
        for step in range(4):
            at = descriptor(source, "v_tile", base + half * CONSTANTS["HALF_BYTES"]) + value_step(step=step)
            found = np.array([[memory.read(at, n, k, True) for n in range(256)] for k in range(16)])
            np.testing.assert_array_equal(found, values[step * 16 : step * 16 + 16, half * 256 : half * 256 + 256])


def test_stage_and_slot_offsets(source):
    assert (
        "k_tile = wgmma_descriptor(operand_address(smem.ckv[0][0]), 16, 1024) + stage * (2 * HALF_BYTES / 16);"
        in source
    )
    assert "const uint64_t a = weights_tile + slot * (BLOCK / 16);" in source
    assert "const uint64_t v = v_tile + stage * (2 * HALF_BYTES / 16);" in source
    assert 2 * CONSTANTS["HALF_BYTES"] * 3 < 1 << 18  # so that no sum leaves the address bits


def test_queries_in_registers(source):
    """cp.async into the tile, ldmatrix out of it: the fragments of operand A, 16 dims a step."""
    write = expression(
        source, r"cp_async_16\(q_nope \+ (chunk / 8 \* BLOCK) \+ swizzled_offset<128>\(warp_row \+ row, chunk % 8\)"
    )
    read = expression(
        source,
        r"ldmatrix_x4\(to, q_nope \+ (step / 4 \* BLOCK) \+ swizzled_offset<128>\(warp_row \+ lane % 16, step % 4 \* 2 \+ lane / 16\)\)",
    )
    values, memory = np.arange(64 * 512).reshape(64, 512), Memory(64 * 1024)

    def offset(row, chunk):
        return row * 128 + ((chunk ^ row & 7) << 4)

    for row in range(64):
        for chunk in range(64):
            at = write(chunk=chunk, **CONSTANTS) + offset(row, chunk % 8)
            memory.data[at // 2 : at // 2 + 8] = values[row, chunk * 8 : chunk * 8 + 8]
    for warp in range(4):
        for step in range(0, 32, 5):
            rows = [
                read(step=step, **CONSTANTS) + offset(warp * 16 + lane % 16, step % 4 * 2 + lane // 16)
                for lane in range(32)
            ]
            for lane in range(32):
                for register in range(4):  # matrix `register`: its rows' addresses come from lanes 8 register .. + 7
                    at = rows[8 * register + lane // 4] // 2 + lane % 4 * 2
                    row, dim = (
                        warp * 16 + lane // 4 + 8 * (register % 2),
                        step * 16 + lane % 4 * 2 + 8 * (register // 2),
                    )
                    assert list(memory.data[at : at + 2]) == [values[row, dim], values[row, dim + 1]]


def test_last_queries_are_plain(source):
    """The last step's fragments, stored by stmatrix, read by a descriptor without swizzle."""
    store = expression(source, r"stmatrix_x4\(smem_address\(smem.q_last\[lane / 16\]\) \+ (\(.+?\) \* 16), last")
    leading, stride = re.search(r"wgmma_descriptor_plain\(.+?\), (.+?), (.+?)\);", source).groups()
    leading, stride = eval(leading), eval(stride)
    memory = np.full(2048 // 2, -1)
    values = np.arange(64 * 16).reshape(64, 16)
    for warp in range(4):
        places = [lane // 16 * 1024 + store(warp_row=warp * 16, lane=lane) for lane in range(32)]
        for lane in range(32):
            for register in range(4):
                at = places[8 * register + lane // 4] // 2 + lane % 4 * 2
                row, dim = warp * 16 + lane // 4 + 8 * (register % 2), lane % 4 * 2 + 8 * (register // 2)
                memory[at : at + 2] = values[row, dim : dim + 2]
    found = [
        [memory[(m // 8 * stride + m % 8 * 16 + k // 8 * leading + k % 8 * 2) // 2] for k in range(16)]
        for m in range(64)
    ]
    np.testing.assert_array_equal(found, values)


def test_weights_through_shared_memory(source):
    """Accumulators of the scores, packed and stored by stmatrix, are operand A of the output."""
    assert "swizzled_offset<128>(warp_row + lane % 16, lane / 16);" in source
    assert (
        "stmatrix_x4(weights ^ (step * 32), pack(2 * step, 0), pack(2 * step, 1), pack(2 * step + 1, 0), pack(2 * step + 1, 1));"
        in source
    )
    weight_step = expression(source, r"wgmma_output\(out, a \+ (.+?), v")
    base, memory = 5 * 1024, Memory(16 * 1024)
    values = np.arange(64 * 64).reshape(64, 64)
    for warp in range(4):
        for step in range(4):
            rows = [
                base + (warp * 16 + lane % 16) * 128 + ((lane // 16 ^ lane % 16 & 7) << 4) ^ step * 32
                for lane in range(32)
            ]
            for lane in range(32):
                for register in range(4):
                    n, h = 2 * step + register // 2, register % 2
                    held = values[warp * 16 + lane // 4 + 8 * h, 8 * n + lane % 4 * 2 :][
                        :2
                    ]  # accumulators score[n][2 h], [2 h + 1]
                    at = rows[8 * register + lane // 4] // 2 + lane % 4 * 2
                    memory.data[at : at + 2] = held
    for step in range(4):
        at = descriptor(source, "weights_tile", base) + weight_step(step=step)
        found = np.array([[memory.read(at, m, k, False) for k in range(16)] for m in range(64)])
        np.testing.assert_array_equal(found, values[:, step * 16 : step * 16 + 16])


def test_zeroed_rows(source):
    """What is zeroed behind the last key is those rows and no others."""
    zero = expression(source, r"store_shared_16\(smem_address\(smem.ckv\[0\]\[half\]\) \+ (.+?), zeros\)")
    values, valid = np.arange(1, 64 * 512 + 1).reshape(64, 512), 37
    memory = Memory(80 * 1024)
    load_tile(memory, 0, values, 64)
    for half in range(2):
        for task in range((64 - valid) * 32):
            at = half * CONSTANTS["HALF_BYTES"] + zero(row=valid + task // 32, chunk=task % 32, **CONSTANTS)
            memory.data[at // 2 : at // 2 + 8] = 0
    for row in range(64):
        for column in range(0, 512, 3):
            linear = column // 64 * CONSTANTS["BLOCK"] + row * 128 + column % 64 * 2
            assert memory.data[swizzle(linear) // 2] == (values[row, column] if row < valid else 0)


# ---- barriers --------------------------------------------------------------------------------------------------------------------
class Barrier:
    """An mbarrier whose phase ends with `count` arrivals."""

    def __init__(self, count):
        self.count = self.pending = count
        self.phase = 0

    def arrive(self):
        assert self.pending > 0
        self.pending -= 1
        if not self.pending:
            self.pending, self.phase = self.count, self.phase + 1

    def ended(self, parity):
        return self.phase % 2 != parity


def schedule(num_tiles, seed):
    """Score and output warpgroups as generators, run in random turns. Returns what each product read."""
    rng = np.random.default_rng(seed)
    barriers = {("full", s, h): Barrier(1) for s in range(3) for h in range(2)}
    barriers |= {("empty", s, h): Barrier(4) for s in range(3) for h in range(2)}
    barriers |= {("weights_full", i): Barrier(4) for i in range(2)}
    barriers |= {("weights_empty", i): Barrier(8) for i in range(2)}
    barriers |= {"kpe_full": Barrier(1), "kpe_empty": Barrier(4)}
    memory, read = {}, []

    def wait(barrier, parity):
        while not barrier.ended(parity):
            yield

    def scores():
        if num_tiles > 2:
            yield
            for _ in range(4):
                barriers["empty", 2, 0].arrive()
                barriers["empty", 2, 1].arrive()
        arrived = True
        for i in range(num_tiles):
            at_once = not arrived
            if at_once:
                for _ in range(4):
                    barriers["weights_full", (i - 1) & 1].arrive()
            for h in range(2):
                yield from wait(barriers["full", i % 3, h], i // 3 & 1)
                read.append(("k", h, i, memory[i % 3, h]))
                yield
            yield from wait(barriers["kpe_full"], i & 1)
            read.append(("kpe", 0, i, memory["kpe"]))
            if i > 0 and not at_once:
                for _ in range(4):
                    barriers["weights_full", (i - 1) & 1].arrive()
            yield from wait(barriers["weights_empty", i & 1], (i // 2 - 1) & 1)
            yield
            assert memory[i % 3, 0] == memory[i % 3, 1] == i  # not overwritten while it was read
            assert memory["kpe"] == i
            for _ in range(4):
                barriers["kpe_empty"].arrive()
            arrived = barriers["full", (i + 1) % 3, 0].ended((i + 1) // 3 & 1)
            yield
            memory["weights", i & 1] = i
            yield
        for _ in range(4):
            barriers["weights_full", (num_tiles - 1) & 1].arrive()

    def output(h):
        def load(i):
            memory[i % 3, h] = i
            barriers["full", i % 3, h].arrive()

        def load_kpe(i):
            memory["kpe"] = i
            barriers["kpe_full"].arrive()

        for i in range(min(num_tiles, 3)):
            if i == 2:
                yield from wait(barriers["empty", 2, h], 0)
            load(i)
            yield
        if h == 0:  # it brings the rotary part
            load_kpe(0)
            if num_tiles > 1:
                yield from wait(barriers["kpe_empty"], 0)
                load_kpe(1)
        for i in range(num_tiles):
            yield from wait(barriers["full", i % 3, h], i // 3 & 1)
            yield from wait(barriers["weights_full", i & 1], i // 2 & 1)
            read.append(("v", h, i, memory[i % 3, h]))
            read.append(("weights", h, i, memory["weights", i & 1]))
            yield
            kpe_waits = h == 0 and i + 2 < num_tiles
            if kpe_waits and barriers["kpe_empty"].ended((i + 1) & 1):
                load_kpe(i + 2)
                kpe_waits = False
            yield
            assert memory[i % 3, h] == i
            assert memory["weights", i & 1] == i
            for _ in range(4):
                barriers["weights_empty", i & 1].arrive()
            if i + 3 < num_tiles:
                for _ in range(4):
                    barriers["empty", i % 3, h].arrive()
                yield from wait(barriers["empty", i % 3, h], (i // 3 & 1) ^ (i % 3 == 2))
                load(i + 3)
            if kpe_waits:
                yield from wait(barriers["kpe_empty"], (i + 1) & 1)
                load_kpe(i + 2)

    active = [scores(), output(0), output(1)]
    for _ in range(20000):
        if not active:
            return read
        one = active[rng.integers(len(active))]
        if next(one, "end") == "end":
            active.remove(one)
    raise AssertionError("deadlock")


def test_barrier_phases():
    """No deadlock, and every product reads its own tile, whatever the speed of the warpgroups."""
    for num_tiles in (1, 2, 3, 4, 5, 6, 7, 12, 13):
        for seed in range(12):
            read = schedule(num_tiles, seed)
            assert len(read) == num_tiles * 7
            assert all(want == got for _, _, want, got in read)


def test_phases_in_the_source(source):
    """The parities and counts that `schedule` uses are those of the kernel."""
    for line in (
        "const int stage = i % STAGES;",
        "const int round = i / STAGES & 1;",
        "mbarrier_wait(smem_address(&smem.kpe_full), i & 1);",
        "mbarrier_wait(smem_address(&smem.kpe_empty), 0);",
        "mbarrier_test(smem_address(&smem.kpe_empty), (i + 1) & 1)",
        "mbarrier_wait(smem_address(&smem.kpe_empty), (i + 1) & 1);",
        "mbarrier_wait(smem_address(&smem.weights_empty[slot]), (i / 2 - 1) & 1);",
        "mbarrier_wait(smem_address(&smem.weights_full[slot]), i / 2 & 1);",
        "mbarrier_wait(smem_address(&smem.empty[stage][half]), round ^ (stage == 2 ? 1 : 0));",
        "mbarrier_wait(smem_address(&smem.empty[2][half]), 0);",
        "mbarrier_init(smem_address(&empty[s][h]), 4);",
        "mbarrier_init(smem_address(&weights_full[i]), 4);",
        "mbarrier_init(smem_address(&weights_empty[i]), 8);",
        "mbarrier_init(smem_address(&kpe_empty), 4);",
    ):
        assert line in source, line


# ---- host ------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hopper(monkeypatch):
    """cuda:0 is a Hopper GPU, and launches are recorded."""
    pytest.importorskip("torch")
    from pyinfer.core import device

    _, submitted = stub_runtime.install(monkeypatch)
    monkeypatch.setattr(tensormap, "encode", fake_map)
    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    caches = (mla_sm90.prepare_mla_sm90, mla_sm90._kernel, mla.prepare_mla, mla._kernel, tensormap.table)
    for cache in caches:
        cache.cache_clear()
    yield submitted
    for cache in caches:
        cache.cache_clear()


def planned(heads, qo, kv, page_size, backend="auto"):
    """(wrapper, q_nope, q_pe, cache) of a batch whose host metadata are planned when q shows the device."""
    import torch

    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=backend)
    pages = [-(-n // page_size) for n in kv]
    kv_indptr = np.cumsum([0, *pages]).astype(np.int32)
    wrapper.plan(
        np.cumsum([0, *qo]).astype(np.int32), kv_indptr, np.arange(kv_indptr[-1], dtype=np.int32), np.array(kv, np.int32), heads, 512, 64, page_size, True,
        SCALE, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip
    q = torch.zeros(sum(qo), heads, 576, dtype=torch.bfloat16)
    cache = torch.zeros(int(kv_indptr[-1]), page_size, 576, dtype=torch.bfloat16)
    return wrapper, q[..., :512], q[..., 512:], cache


@pytest.mark.parametrize(
    ("heads", "qo", "page_size", "rows"), [(128, 1, 64, 64), (16, 4, 16, 16), (16, 5, 24, 8), (3, 1, 256, 64)]
)
def test_launch(hopper, heads, qo, page_size, rows):
    wrapper, nope, pe, cache = planned(heads, [qo, qo], [500, 90], page_size)
    out, lse = wrapper.run(nope, pe, cache[..., :512], cache[..., 512:], return_lse=True, return_lse_base_on_e=True)
    name, grid, data, *_ = hopper.pop()
    plan = wrapper.plan_info
    assert name == "mla_sm90_bf16_q64_kv64"
    assert grid == (plan.n_work, 1, 1)
    assert plan.tile_q == 64
    found = stub_driver.fields(mla_sm90.PARAMS, data)
    for key, x in (("q_nope", nope), ("q_pe", pe), ("out", out), ("lse", lse)):
        assert found[key] == x.data_ptr()
    pages = cache.shape[0]
    strides = (576, 576 * page_size)
    box = (64, rows, 1)
    assert found["ckv_map"] == fake_map(cache.data_ptr(), BFLOAT16, (512, page_size, pages), strides, box)
    assert found["kpe_map"] == fake_map(cache.data_ptr() + 1024, BFLOAT16, (64, page_size, pages), strides, box)
    assert found["box_rows"] == rows
    assert found["page_size"] == page_size
    assert found["group"] == heads
    assert found["slots"] == 132
    assert found["causal"] == 1
    assert found["window_left"] == -1
    assert found["q_nope_stride_token"] == found["q_pe_stride_token"] == 576 * heads
    assert found["out_stride_token"] == 512 * heads
    assert found["logit_scale"] == pytest.approx(SCALE * 1.4426950408889634)
    assert found["lse_scale"] == pytest.approx(np.log(2))
    base = found["plan_header"]
    assert found["semaphore"] == base + 4 * plan.offsets.semaphore
    assert found["kv_indices"] == base + 4 * plan.offsets.kv_indices
    assert found["partial_lse"] == found["partial_o"] + plan.partial_lse_offset


def test_families(hopper):
    """Which kernel runs: "fa2" by name, odd pages and caches that TMA cannot read fall back to it, "fa3" refuses them."""
    import torch

    def run(backend, page_size, change=lambda cache: cache):
        wrapper, nope, pe, cache = planned(16, [2], [100], page_size, backend)
        cache = change(cache)
        wrapper.run(nope, pe, cache[..., :512], cache[..., 512:])
        return hopper.pop()[0].split("_bf16")[0], wrapper

    assert run("auto", 64)[0] == run("fa3", 64)[0] == "mla_sm90"
    assert run("fa2", 64)[0] == run("auto", 1)[0] == run("auto", 20)[0] == "mla_sm80"

    def broadcast(cache):
        return torch.zeros(1, 1, 576, dtype=torch.bfloat16).expand(*cache.shape)

    name, wrapper = run("auto", 64, broadcast)
    assert name == "mla_sm80"
    assert wrapper.plan_info.tile_q == mla.mla_config(90, 32).tile_q
    with pytest.raises(
        ValueError, match=r"ckv_cache is not covered by backend 'fa3': got shape \(2, 64, 512\), strides \(0, 0, 1\)"
    ):
        run("fa3", 64, broadcast)
    with pytest.raises(ValueError, match="page_size is not covered by backend 'fa3': got 20, wanted a multiple of 8"):
        run("fa3", 20)


def test_choice():
    for arch in (80, 89, 100, 120):
        assert isinstance(mla.choose_config(arch, 128, 64), mla.MlaConfig)
        with pytest.raises(ValueError, match=f"backend needs a Hopper GPU: got 'fa3' on architecture {arch}"):
            mla.choose_config(arch, 128, 64, "fa3")
    assert mla.choose_config(90, 128, 8) == mla.choose_config(90, 1, 64, "fa3") == mla_sm90.MlaSm90Config()
    assert isinstance(mla.choose_config(90, 64, 4), mla.MlaConfig)
    assert [mla_sm90.box_rows(n) for n in (1, 4, 8, 20, 24, 48, 64, 100, 128)] == [0, 0, 8, 0, 8, 16, 64, 0, 64]


def test_module(monkeypatch):
    """gen_batch_mla_module's backends."""
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", "8.0 9.0a")
    kinds = {
        b: {s.template for s in mla.gen_batch_mla_module(b, "float16", "float16", "float16").specs}
        for b in mla.BACKENDS
    }
    sm80, sm90 = "mla/mla_sm80.cu.jinja", "mla/mla_sm90.cu.jinja"
    assert kinds == {"auto": {sm80, sm90}, "fa2": {sm80}, "fa3": {sm90}}
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(ValueError, match="gen_batch_mla_module: backend needs a Hopper GPU: got 'fa3'"):
        mla.gen_batch_mla_module("fa3", "float16", "float16", "float16")
    with pytest.raises(TypeError, match="dtype_o differs from dtype_q: got float16, wanted bfloat16"):
        mla.gen_batch_mla_module("auto", "bfloat16", "bfloat16", "float16")
    with pytest.raises(
        ValueError, match="dtype_kv is not covered by backend 'fa3': got float8_e4m3fn, wanted bfloat16"
    ):
        mla.gen_batch_mla_module("fa3", "bfloat16", "float8_e4m3fn", "bfloat16")
    with pytest.raises(
        ValueError, match="kv_data_type is not covered by backend 'fa3': got 8-bit floats, wanted float16"
    ):
        mla.choose_config(90, 64, 64, "fa3", 1)


@pytest.mark.compile
def test_compiles():
    """No spill, no warning of ptxas about wgmma or setmaxnreg, no static shared memory, registers that add up."""
    config = mla_sm90.mla_sm90_config()
    assert config.score_registers + 2 * config.output_registers <= 3 * 168
    assert config.smem <= 227 * 1024
    for dtype in (BFLOAT16, FLOAT16):
        for soft_cap in (False, True):
            artifact = mla_sm90.gen_mla_sm90(config, dtype, soft_cap).build("90a")
            used = artifact.resources
            assert used.spill_stores == used.spill_loads == used.stack == used.smem == 0, used
            assert used.registers == 168
            assert not [line for line in artifact.log.splitlines() if "(C75" in line], artifact.log
