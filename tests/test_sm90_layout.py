"""The shared-memory layouts of the sm90 prefill kernel, emulated: what TMA writes, what the kernel writes itself, and what wgmma reads by its descriptors.

The address arithmetic is taken from the CUDA source, not repeated here, and evaluated with Python's integers. The models of TMA and wgmma are those of
the PTX ISA: with the 128-byte swizzle, bits 4-6 of an address are xored with its bits 7-9.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pyinfer.jit import attention_sm90
from pyinfer.jit.compiler import render

SOURCES = Path(__file__).parent.parent / "cuda_src"
CONFIGS = [c for dim in attention_sm90.HEAD_DIMS for c in attention_sm90.candidates(dim)]
CONFIGS = list({(c.head_dim_qk, c.tile_kv): c for c in CONFIGS}.values())


def swizzle(address):
    return address ^ ((address >> 7 & 7) << 4)


def expression(source, pattern):
    """The C++ integer expression that `pattern` captures, as a Python function of keyword arguments."""
    found = re.findall(pattern, source)
    assert found and len(set(found)) == 1, (pattern, found)
    code = re.sub(r"(?<!/)/(?!/)", "//", found[0])
    return lambda **values: eval(code, {}, values)


class Memory:
    """Shared memory as 16-bit elements, poisoned with -1; addresses in bytes."""

    def __init__(self, size):
        self.data = np.full(size // 2, -1, np.int64)

    def tma(self, address, box):
        """A box [rows, 64 columns] arrives."""
        assert address % 128 == 0
        for row in range(box.shape[0]):
            for column in range(64):
                self.data[swizzle(address + row * 128 + column * 2) // 2] = box[row, column]

    def read(self, descriptor, mn, k, transposed):
        """Element (mn, k) of a wgmma operand."""
        start, leading, stride = descriptor & 0x3FFF, descriptor >> 16 & 0x3FFF, descriptor >> 32 & 0x3FFF
        assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0
        start, leading, stride = 16 * start, 16 * leading, 16 * stride
        if transposed:
            linear = start + mn // 64 * leading + mn % 64 * 2 + k // 8 * stride + k % 8 * 128
        else:
            linear = start + mn // 8 * stride + mn % 8 * 128 + k * 2
        return self.data[swizzle(linear) // 2]


@pytest.fixture(params=CONFIGS, ids=lambda c: f"d{c.head_dim_qk}_kv{c.tile_kv}")
def kernel(request):
    """Config, rendered source, and its constants."""
    config = request.param
    source = render(attention_sm90.gen_prefill_sm90(config, "bfloat16"), "90a")
    tile, dim = config.tile_kv, config.head_dim_qk
    constants = dict(Q_BLOCK=64 * 128, KV_BLOCK=tile * 128, HEAD_DIM_QK=dim, HEAD_DIM_VO=dim, TILE_KV=tile)
    for name in ("Q_BLOCK", "KV_BLOCK"):
        value = expression(source, rf"constexpr int {name} = (.+?);")
        assert value(**constants) == constants[name]
    header = (SOURCES / "common" / "ptx_wgmma.cuh").read_text()
    assert (
        "address >> 4" in header
        and "(leading >> 4) << 16" in header
        and "(stride >> 4) << 32" in header
        and "1ull << 62" in header
    )

    def descriptor(which, address):
        leading, stride = re.search(rf"{which} = wgmma_descriptor\(.+?\), (\w+), (\w+)\);", source).groups()
        leading, stride = (int(constants.get(x, x)) for x in (leading, stride))
        return address >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 62

    return config, source, constants, descriptor


def load_tile(memory, base, values, constants, rows):
    """K or V [tile, dim] as the producer brings it: boxes of `rows` keys, 64 columns."""
    tile, dim = values.shape
    for lane in range(tile // rows):
        for x in range(0, dim, 64):
            memory.tma(
                base + x // 64 * constants["KV_BLOCK"] + lane * rows * 128,
                values[lane * rows : (lane + 1) * rows, x : x + 64],
            )


def boxes(tile):
    return sorted({r for r in (8, 16, 32, tile) if tile % r == 0})


def test_box_address(kernel):
    """`load_tile` above is what the source does."""
    source = kernel[1]
    assert "tma_load_4d(tile + x / 64 * KV_BLOCK + lane * rows * 128, map, full, x, y, w.kv_head, at.page);" in source


def test_queries(kernel):
    config, source, constants, descriptor = kernel
    dim = config.head_dim_qk
    offset = expression(
        source,
        r"const uint32_t place = (chunk / 8 \* Q_BLOCK) \+ swizzled_offset<128>\(warp % 4 \* 16 \+ row, chunk % 8\);",
    )
    swizzled = (SOURCES / "common" / "swizzle.cuh").read_text()
    assert "row * ROW_BYTES + ((chunk ^ (row & 7)) << 4)" in swizzled
    base, memory = 3 * 1024, Memory(64 * 1024)
    values = np.arange(64 * dim).reshape(64, dim)
    for row in range(64):
        for chunk in range(dim // 8):
            at = base + offset(chunk=chunk, Q_BLOCK=constants["Q_BLOCK"]) + row * 128 + ((chunk % 8 ^ row & 7) << 4)
            memory.data[at // 2 : at // 2 + 8] = values[row, chunk * 8 : chunk * 8 + 8]
    step_offset = expression(source, r"wgmma_ss\(score, q_tile \+ (\(.+?\) / 16), k_tile")
    for step in range(dim // 16):
        at = descriptor("q_tile", base) + step_offset(step=step, **constants)
        found = np.array([[memory.read(at, m, k, False) for k in range(16)] for m in range(64)])
        np.testing.assert_array_equal(found, values[:, step * 16 : step * 16 + 16])


def test_keys(kernel):
    config, source, constants, descriptor = kernel
    dim, tile = config.head_dim_qk, config.tile_kv
    step_offset = expression(source, r"wgmma_ss\(score, q_tile \+ .+?, k_tile \+ (\(.+?\) / 16), step > 0\)")
    values = np.arange(tile * dim).reshape(tile, dim)
    for rows in boxes(tile):
        base, memory = 5 * 1024, Memory(128 * 1024)
        load_tile(memory, base, values, constants, rows)
        for step in range(0, dim // 16, 3 if rows < tile else 1):
            at = descriptor("k_tile", base) + step_offset(step=step, **constants)
            found = np.array([[memory.read(at, n, k, False) for k in range(16)] for n in range(tile)])
            np.testing.assert_array_equal(found, values[:, step * 16 : step * 16 + 16])


def test_values_and_zeroing(kernel):
    config, source, constants, descriptor = kernel
    dim, tile = config.head_dim_vo, config.tile_kv
    step_offset = expression(source, r"wgmma_rs\(out, weights\[step\], v_tile \+ (step \* 2048 / 16)\)")
    zero_offset = expression(source, r"store_shared_16\(v_tile \+ (.+?), zeros\)")
    base, memory, valid = 7 * 1024, Memory(128 * 1024), tile - 13
    values = np.arange(1, tile * dim + 1).reshape(tile, dim)
    load_tile(memory, base, values, constants, tile)
    for clean in (True, False):
        if not clean:
            for task in range((tile - valid) * (dim // 8)):
                at = base + zero_offset(row=valid + task // (dim // 8), chunk=task % (dim // 8), **constants)
                memory.data[at // 2 : at // 2 + 8] = 0
            values[valid:] = 0
        for step in range(tile // 16):
            at = descriptor("v_tile", base) + step_offset(step=step)
            found = np.array([[memory.read(at, n, k, True) for n in range(dim)] for k in range(16)])
            np.testing.assert_array_equal(found, values[step * 16 : step * 16 + 16])


def test_weights_are_the_a_operand(kernel):
    """Accumulator registers of a 64 x TILE_KV product, packed in pairs, are the fragments of A that wgmma wants for 16 keys at a time."""
    config, source, *_ = kernel
    pattern = r"weights\[step\]\[(\d)\] = pack2<scalar_t>\(score\[(.+?)\]\[(\d)\], score\[(.+?)\]\[(\d)\]\);"
    found = re.findall(pattern, source)
    assert len(found) == 4
    for step in range(config.tile_kv // 16):
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for register, block, first, other, second in found:
                assert block == other
                n = eval(block, {}, {"step": step})
                held = [
                    (g + 8 * (int(i) // 2), 8 * n + 2 * t + int(i) % 2) for i in (first, second)
                ]  # (row, key) of accumulators
                row, key = g + 8 * (int(register) % 2), 16 * step + 2 * t + 8 * (int(register) // 2)
                assert held == [(row, key), (row, key + 1)]


def schedule(num_tiles, stages):
    """Producer and consumer of one warpgroup as generators of (barrier, action); run until both end. Returns the tiles that consumers read."""
    phase: dict[str, int] = {}
    buffers: dict[str, int] = {}

    def done(barrier, parity):
        return phase.get(barrier, 0) % 2 != parity  # the phase of this parity has ended

    def producer():
        for i in range(num_tiles + 1):
            for kind, j in (("k", i), ("v", i - 1)):
                if 0 <= j < num_tiles:
                    s = j % stages
                    if j >= stages:
                        while not done(f"{kind}_empty{s}", (j // stages - 1) & 1):
                            yield
                    buffers[f"{kind}{s}"] = j
                    phase[f"{kind}_full{s}"] = phase.get(f"{kind}_full{s}", 0) + 1
                    yield

    read = []

    def consume(kind, j):
        s = j % stages
        while not done(f"{kind}_full{s}", j // stages & 1):
            yield
        read.append((kind, j, buffers[f"{kind}{s}"]))
        yield
        assert buffers[f"{kind}{s}"] == j  # not overwritten before the release
        phase[f"{kind}_empty{s}"] = phase.get(f"{kind}_empty{s}", 0) + 1

    def consumer():
        yield from consume("k", 0)
        for i in range(1, num_tiles):
            yield from consume("k", i)
            yield from consume("v", i - 1)
        yield from consume("v", num_tiles - 1)

    rng = np.random.default_rng(num_tiles)
    active = [producer(), consumer()]
    for _ in range(10000):
        if not active:
            return read
        one = active[rng.integers(len(active))]
        if next(one, "end") == "end":
            active.remove(one)
    raise AssertionError("deadlock")


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_ring_phases(stages):
    """No deadlock, and every product reads its own tile, whatever the speed of the two sides."""
    for num_tiles in (1, 2, 3, 4, 5, 8, 13):
        read = schedule(num_tiles, stages)
        assert len(read) == 2 * num_tiles and all(want == got for _, want, got in read)


def test_phases_in_the_source():
    """The parities that `schedule` uses are those of the kernel."""
    text = (SOURCES / "prefill" / "prefill_sm90.cu.jinja").read_text()
    for line in (
        "mbarrier_wait(smem_address(&smem.k_empty[stage]), (i / STAGES - 1) & 1);",
        "mbarrier_wait(smem_address(&smem.v_empty[stage]), (j / STAGES - 1) & 1);",
        "mbarrier_wait(smem_address(&smem.k_full[i % STAGES]), i / STAGES & 1);",
        "mbarrier_wait(smem_address(&smem.v_full[before]), (i - 1) / STAGES & 1);",
    ):
        assert line in text
