"""The shared-memory layouts of the sm90 prefill kernel, emulated: what TMA writes, what the kernel writes itself, and what wgmma reads by its descriptors.

The address arithmetic is taken from the CUDA source, not repeated here, and evaluated with Python's integers. The models of TMA and wgmma are those of
the PTX ISA: with the 128-byte swizzle, bits 4-6 of an address are xored with its bits 7-9.
"""

from __future__ import annotations

import itertools
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
        leading, stride = re.search(rf"{which} = wgmma_descriptor\(.+?, (\w+), (\w+)\);", source).groups()
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
    assert "const uint32_t to = tiles + tile.slot() * bytes + lane * rows * 128;" in source
    assert (
        "tma_load_4d(to + x / 64 * KV_BLOCK, map, full + 8 * tile.slot(), x, here.slot, kv_head, here.page);" in source
    )


def test_queries(kernel):
    config, source, constants, descriptor = kernel
    dim = config.head_dim_qk
    offset = expression(
        source, r"const uint32_t place = (chunk / 8 \* Q_BLOCK) \+ swizzled_offset<128>\(row, chunk % 8\);"
    )
    rows_at = expression(source, r"const uint32_t rows = to \+ (first / 64 \* \(64 \* Q_ROW\) \+ first % 64 \* 128);")
    swizzled = (SOURCES / "common" / "swizzle.cuh").read_text()
    assert "row * ROW_BYTES + ((chunk ^ (row & 7)) << 4)" in swizzled
    base, memory = 3 * 1024, Memory(64 * 1024)
    values = np.arange(64 * dim).reshape(64, dim)
    for first, row in itertools.product((0, 32), range(32)):
        for chunk in range(dim // 8):
            at = base + rows_at(first=first, Q_ROW=2 * dim) + offset(chunk=chunk, Q_BLOCK=constants["Q_BLOCK"])
            at += row * 128 + ((chunk % 8 ^ row & 7) << 4)
            memory.data[at // 2 : at // 2 + 8] = values[first + row, chunk * 8 : chunk * 8 + 8]
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
    step_offset = expression(
        source, r"wgmma_rs\(out, weights\[step\], v_tile \+ (step \* 2048 / 16), accumulate \|\| step > 0\)"
    )
    zero_offset = expression(source, r"store_shared_16\(v_rows \+ (.+?), zeros\)")
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


@pytest.mark.parametrize("dim", [64, 72, 96, 128, 192, 256])
def test_output_rows(dim):
    """Accumulators, through stmatrix and shared memory, leave as boxes of 64 columns by TMA or as 16-byte pieces of rows."""
    source = render(attention_sm90.gen_prefill_sm90(attention_sm90.candidates(dim)[0], "bfloat16"), "90a")
    matrix_row = expression(source, r"const int matrix_row = (.+?);")
    block_of = expression(source, r"smem_address\(out_rows\) \+ (d / 8 \* Q_BLOCK) \+ swizzled_offset")
    chunk_of = expression(source, r"swizzled_offset<128>\(matrix_row, (d % 8 \+ lane / 16)\)")
    row_of = expression(source, r"const int row = min_of\((\(n \* 32 \+ lane\) / CHUNKS), 15\);")
    piece_of = expression(source, r"const int chunk = (\(n \* 32 \+ lane\) % CHUNKS);")
    read_block = expression(source, r"out_rows \+ (chunk / 8 \* Q_BLOCK) \+ swizzled_offset<128>\(row, chunk % 8\)")
    warp_base = expression(source, r"softmax, out, q_rows \+ (warp % 4 \* 16 \* 128), warp_row, lane\);")
    blocks, columns, q_block = dim // 8, -(-dim // 64) * 64, 64 * 128
    memory = Memory(columns // 64 * q_block)
    values = np.arange(64 * columns).reshape(64, columns)

    def swizzled(row, chunk):
        return row * 128 + ((chunk ^ row & 7) << 4)

    for warp in range(4):
        for d in range(0, blocks, 2):
            for lane in range(32):  # lane 8m + r has the address of row r of matrix m
                row, m = lane % 8 + lane // 8 % 2 * 8, lane // 8
                at = warp_base(warp=warp) + block_of(d=d, Q_BLOCK=q_block)
                at += swizzled(matrix_row(lane=lane), chunk_of(d=d, lane=lane))
                column = (d + m // 2) * 8
                memory.data[at // 2 : at // 2 + 8] = values[warp * 16 + row, column : column + 8]
    boxes = Memory(len(memory.data) * 2)
    for x in range(0, columns, 64):
        boxes.tma(x // 64 * q_block, values[:, x : x + 64])
    written = memory.data >= 0
    np.testing.assert_array_equal(memory.data[written], boxes.data[written])
    assert written.sum() >= 64 * dim
    found = np.full((64, dim), -1)
    for warp, n, lane in itertools.product(range(4), range(-(-16 * blocks // 32)), range(32)):
        if n * 32 + lane < 16 * blocks:
            row, chunk = row_of(n=n, lane=lane, CHUNKS=blocks), piece_of(n=n, lane=lane, CHUNKS=blocks)
            at = (warp_base(warp=warp) + read_block(chunk=chunk, Q_BLOCK=q_block) + swizzled(row, chunk % 8)) // 2
            found[warp * 16 + row, chunk * 8 : chunk * 8 + 8] = memory.data[at : at + 8]
    np.testing.assert_array_equal(found, values[:, :dim])


class Ring:
    """The kernel's `Ring`: slot and parity of the n-th use."""

    def __init__(self, slots):
        self.slots, self.slot, self.parity = slots, 0, 0

    def next(self):
        self.slot += 1
        if self.slot == self.slots:
            self.slot, self.parity = 0, self.parity ^ 1


class Barriers:
    """mbarriers by name: a phase ends after `arrivals` arrivals."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.pending: dict[str, int] = {}
        self.phase: dict[str, int] = {}

    def init(self, name, slots, arrivals):
        for s in range(slots):
            self.counts[f"{name}{s}"], self.pending[f"{name}{s}"], self.phase[f"{name}{s}"] = arrivals, arrivals, 0

    def arrive(self, name):
        self.pending[name] -= 1
        if self.pending[name] == 0:
            self.pending[name], self.phase[name] = self.counts[name], self.phase[name] + 1

    def wait(self, name, parity):
        """Until the phase of this parity has ended."""
        while self.phase[name] % 2 == parity:
            yield


WORKS, LAST_TILES = 4, 3


class Block:
    """The protocol of a block's roles, one generator each; what they read is checked against what they mean to read.

    items: the numbers of tiles of the work items; consumers: warpgroups, each standing for its warps.
    """

    def __init__(self, items, consumers, stages, q_buffers, loaders=1):
        self.items, self.consumers, self.stages, self.q_buffers = items, consumers, stages, q_buffers
        self.early, self.loaders = q_buffers > 1, loaders
        self.barriers = b = Barriers()
        for name, slots, full, empty in (
            ("k", stages, loaders, consumers), ("v", stages, loaders, consumers), ("q", q_buffers, 1, consumers),
            ("work", WORKS, 1, consumers + 2 * loaders + 1),
        ):  # fmt: skip
            b.init(f"{name}_full", slots, full)
            b.init(f"{name}_empty", slots, empty)
        b.init("work_ending", WORKS, 1)
        self.taken = 0  # items
        self.loaded: dict[str, set[int]] = {}  # by which loaders, of the tile that is being brought
        self.memory: dict[str, object] = {}
        self.products: list[tuple] = []
        self.outputs: list[set] = [set() for _ in range(q_buffers)]  # staged in a buffer of queries: (warpgroup, item)
        self.stored: list[int] = []

    def roles(self):
        yield self.find_work()
        for loader in range(self.loaders):
            yield self.copy("k", loader)
            yield self.copy("v", loader)
        yield self.copy_queries()
        for group in range(self.consumers):
            yield self.consume(group)

    def find_work(self):
        at, b = Ring(WORKS), self.barriers
        for n in range(len(self.items) + 1):
            yield from b.wait(f"work_empty{at.slot}", at.parity ^ 1)
            self.memory[f"work{at.slot}"] = n if n < len(self.items) else None
            b.arrive(f"work_full{at.slot}")
            self.taken = n
            if n < len(self.items) and self.items[n] > LAST_TILES:
                yield from b.wait(f"work_ending{at.slot}", at.parity)
            at.next()
            yield

    def copy(self, kind, loader):
        at, tile, b = Ring(WORKS), Ring(self.stages), self.barriers
        yield from b.wait(f"work_full{at.slot}", at.parity)
        item = self.memory[f"work{at.slot}"]
        while item is not None:
            current = item
            tiles = self.items[current]
            for i in range(tiles):
                if kind == "k" and loader == 0 and i == max(tiles - LAST_TILES, 0):
                    assert tiles <= LAST_TILES or self.taken == current  # nobody has looked further
                    b.arrive(f"work_ending{at.slot}")
                if i + 1 == tiles:
                    b.arrive(f"work_empty{at.slot}")
                    at.next()
                    yield from b.wait(f"work_full{at.slot}", at.parity)
                    item = self.memory[f"work{at.slot}"]
                yield from b.wait(f"{kind}_empty{tile.slot}", tile.parity ^ 1)
                part = self.loaded.setdefault(f"{kind}{tile.slot} {current} {i}", set())
                part.add(loader)
                self.memory[f"{kind}{tile.slot}"] = (current, i) if len(part) == self.loaders else "part"
                yield
                b.arrive(f"{kind}_full{tile.slot}")
                tile.next()

    def copy_queries(self):
        b, brought, retired = self.barriers, 0, 0

        def retire():
            slot = retired % self.q_buffers
            yield from b.wait(f"q_empty{slot}", retired // self.q_buffers & 1)
            assert self.outputs[slot] == {(group, retired) for group in range(self.consumers)}  # all of it is there
            self.outputs[slot] = set()
            self.stored.append(retired)
            yield

        while True:
            work = brought % WORKS
            yield from b.wait(f"work_full{work}", brought // WORKS & 1)
            item = self.memory[f"work{work}"]
            if item is None:
                break
            if brought - retired == self.q_buffers:
                yield from retire()
                retired += 1
            slot = brought % self.q_buffers
            brought += 1
            self.memory[f"q{slot}"] = item
            yield
            b.arrive(f"q_full{slot}")
            b.arrive(f"work_empty{work}")
        while retired < brought:
            yield from retire()
            retired += 1

    def consume(self, group):
        b, memory = self.barriers, self.memory
        at, queries, k_ring, v_ring = Ring(WORKS), Ring(self.q_buffers), Ring(self.stages), Ring(self.stages)

        def begin_item(item):
            if item is not None:
                yield from b.wait(f"q_full{queries.slot}", queries.parity)
                yield from b.wait(f"k_full{k_ring.slot}", k_ring.parity)
            return queries.slot, k_ring.slot

        yield from b.wait(f"work_full{at.slot}", at.parity)
        item = memory[f"work{at.slot}"]
        if item is None:
            return
        under_way = yield from begin_item(item)
        while item is not None:
            assert memory[f"work{at.slot}"] == item
            q_slot = queries.slot
            queries.next()
            yield
            # the first product has run: on what?
            assert (memory[f"q{under_way[0]}"], memory[f"k{under_way[1]}"]) == (item, (item, 0)) and under_way[
                0
            ] == q_slot
            b.arrive(f"k_empty{k_ring.slot}")
            k_ring.next()
            for i in range(1, self.items[item]):
                yield from b.wait(f"k_full{k_ring.slot}", k_ring.parity)
                yield from b.wait(f"v_full{v_ring.slot}", v_ring.parity)
                yield
                assert (memory[f"q{q_slot}"], memory[f"k{k_ring.slot}"]) == (item, (item, i))
                b.arrive(f"k_empty{k_ring.slot}")
                k_ring.next()
                yield
                assert memory[f"v{v_ring.slot}"] == (item, i - 1)
                self.products.append((group, item, i - 1))
                b.arrive(f"v_empty{v_ring.slot}")
                v_ring.next()
            yield from b.wait(f"v_full{v_ring.slot}", v_ring.parity)
            following = Ring(WORKS)
            following.slot, following.parity = at.slot, at.parity
            following.next()
            yield from b.wait(f"work_full{following.slot}", following.parity)
            after = memory[f"work{following.slot}"]
            if self.early:
                under_way = yield from begin_item(after)
            yield
            assert memory[f"v{v_ring.slot}"] == (item, self.items[item] - 1)
            self.products.append((group, item, self.items[item] - 1))
            b.arrive(f"v_empty{v_ring.slot}")
            v_ring.next()
            assert memory[f"q{q_slot}"] == item  # whose place the output takes
            self.outputs[q_slot].add((group, item))
            yield
            assert memory[f"work{at.slot}"] == item
            b.arrive(f"q_empty{q_slot}")
            b.arrive(f"work_empty{at.slot}")
            at = following
            if not self.early:
                under_way = yield from begin_item(after)
            item = after


@pytest.mark.parametrize("config", [
    (2, 2, 2), (2, 2, 1), (2, 3, 2, 3), (2, 4, 2), (3, 2, 2), (3, 3, 1), (1, 2, 2), (2, 3, 2, 2),
])  # fmt: skip
def test_protocol(config):
    """No deadlock, and every product reads its own tiles and queries, whatever the speed of each role."""
    rng = np.random.default_rng(config[1])
    for items in ([], [1], [5], [1, 1, 1, 1, 1, 1, 1], [3, 1, 4, 1, 5, 9, 2, 6], [2] * 9):
        for bias in range(4):
            block = Block(items, *config)
            active = list(block.roles())
            speed = 0.01 + rng.random(len(active)) ** (2 * bias)  # some roles much slower than others
            idle = 0
            while active:
                i = rng.choice(len(active), p=speed[: len(active)] / speed[: len(active)].sum())
                before = (
                    dict(block.barriers.phase),
                    dict(block.barriers.pending),
                    len(block.products),
                )
                if next(active[i], "end") == "end":
                    del active[i]
                    idle = 0
                changed = before != (block.barriers.phase, block.barriers.pending, len(block.products))
                idle = 0 if changed else idle + 1
                assert idle < 20000, "deadlock"
            wanted = [(g, n, i) for g in range(config[0]) for n, tiles in enumerate(items) for i in range(tiles)]
            assert sorted(block.products) == wanted and block.stored == list(range(len(items)))


def test_protocol_in_the_source():
    """The waits, their parities and the arrival counts that `Block` uses are those of the kernel."""
    text = "".join(path.read_text() for path in sorted((SOURCES / "prefill").glob("*sm90*.jinja")))
    for line in (
        "mbarrier_init(smem_address(&k_full[s]), GATHER ? 32 * LOADERS : 1);",
        "mbarrier_init(smem_address(&k_empty[s]), CONSUMERS * 4);",
        "mbarrier_init(smem_address(&q_full[s]), 1);",
        "mbarrier_init(smem_address(&q_empty[s]), CONSUMERS * 4);",
        "mbarrier_init(smem_address(&work_empty[s]), CONSUMERS * 4 + 2 * LOADERS + 1);",
        "mbarrier_init(smem_address(&work_ending[s]), 1);",
        f"constexpr int WORKS = {WORKS};",
        f"constexpr int LAST_TILES = {LAST_TILES};",
        "i == max_of(num_tiles - LAST_TILES, 0)",
        "if (more && found.num_tiles > LAST_TILES) {",
        "mbarrier_wait(smem_address(&smem.work_ending[at.slot()]), at.parity());",
        "mbarrier_wait(empty + 8 * tile.slot(), tile.parity() ^ 1);",
        "mbarrier_wait(smem_address(&smem.q_empty[slot]), retired / Q_BUFFERS & 1);",
        "mbarrier_wait(smem_address(&smem.work_full[work]), brought / WORKS & 1);",
        "mbarrier_wait(smem_address(&smem.work_empty[at.slot()]), at.parity() ^ 1);",
        "mbarrier_wait(smem_address(&smem.work_full[at.slot()]), at.parity());",
        "mbarrier_wait(smem_address(&smem.q_full[queries.slot()]), queries.parity());",
        "await_tile(smem.k_full[k_ring.slot()], k_ring.parity());",
        "await_tile(smem.v_full[v_ring.slot()], v_ring.parity());",
    ):
        assert line in text, line
