"""The index maps of the attention kernels, without a GPU: swizzle, ldmatrix and mma lane maps, copies, packed rows, masks, divisions.

The expressions are taken out of the CUDA headers themselves and evaluated here, so a wrong map fails this test before it costs time on a
GPU. What the hardware does (`ldmatrix`, `mma`) is written from the PTX ISA's fragment layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pyinfer.jit.attention_launch import divisor

pytestmark = pytest.mark.compile

SOURCES = Path(__file__).resolve().parents[1] / "cuda_src" / "common"
LANES = np.arange(32)
ROW_BYTES = (128, 256, 384, 512)


def c_function(file: str, name: str, arguments: str, **constants: object) -> Callable[..., object]:
    """A one-expression C function of a header as a Python function of ints or arrays. `constants` are names it uses."""
    text = (SOURCES / file).read_text()
    body = re.search(r"\b" + name + r"\([^)]*\)[^{;]*\{(.*?)\n\s*\}", text, re.DOTALL)
    assert body, f"{name} is not in {file}"
    lines = [re.sub(r"//.*", "", line).strip() for line in body[1].splitlines()]
    code = []
    for line in filter(None, lines):
        if line.startswith("static_assert"):
            continue
        line = re.sub(r"^(const )?(int|uint32_t) (\w+) = ", r"\3 = ", line.rstrip(";"))
        line = re.sub(r"static_cast<\w+>", "", re.sub(r"swizzled_offset<ROW_BYTES>", "swizzled_offset", line))
        line = re.sub(r"(\d)u\b", r"\1", line).replace(" / ", " // ").replace("threadIdx.x", "threadIdx_x")
        code.append("    " + line)
    scope = dict(constants)
    exec(f"def f({arguments}):\n" + "\n".join(code), scope)  # the text of our own header
    return scope["f"]  # type: ignore[return-value]


def swizzled_offset(row_bytes: int) -> Callable[..., np.ndarray]:
    return c_function("swizzle.cuh", "swizzled_offset", "row, chunk", ROW_BYTES=row_bytes)  # type: ignore[return-value]


def lane_offset(name: str, row_bytes: int) -> np.ndarray:
    """A lane map of attention_tile.cuh: byte offset of each of the 32 lanes."""
    f = c_function("attention_tile.cuh", name, "", swizzled_offset=swizzled_offset(row_bytes), threadIdx_x=LANES)
    return np.asarray(f())


swizzled_step = c_function("attention_tile.cuh", "swizzled_step", "address, columns")


# ---- what the hardware does ------------------------------------------------------------------------------------------------------
def ldmatrix(memory: np.ndarray, addresses: np.ndarray, trans: bool = False) -> np.ndarray:
    """[lane, matrix, 2] elements: PTX ISA, ldmatrix .m8n8.x4. `memory` holds 2-byte elements; lane l addresses row l % 8 of matrix l / 8."""
    assert (addresses % 16 == 0).all()
    matrices = memory[addresses[:, None] // 2 + np.arange(8)].reshape(4, 8, 8)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    return np.stack([matrices[:, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2] for lane in LANES])


def mma(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[lane, 4] accumulators of m16n8k16 for fragments a [lane, 4, 2], b [lane, 2, 2]: PTX ISA, "Matrix fragments for mma.m16n8k16"."""
    full_a, full_b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in LANES:
        g, t = divmod(lane, 4)
        for i in range(4):
            full_a[g + 8 * (i % 2), 2 * t + 8 * (i // 2) : 2 * t + 8 * (i // 2) + 2] = a[lane, i]
        for i in range(2):
            full_b[2 * t + 8 * i : 2 * t + 8 * i + 2, g] = b[lane, i]
    d = full_a @ full_b
    return np.stack(
        [d[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1, 2 * t, 2 * t + 1]] for g, t in (divmod(lane, 4) for lane in LANES)]
    )


def store_tile(values: np.ndarray) -> np.ndarray:
    """Rows of 2-byte elements as a swizzled tile in shared memory (float64 elements at 2-byte addresses)."""
    rows, columns = values.shape
    offset = swizzled_offset(columns * 2)
    memory = np.full(rows * columns, np.nan)
    for row in range(rows):
        for chunk in range(columns // 8):
            at = int(offset(row, chunk)) // 2
            memory[at : at + 8] = values[row, chunk * 8 : chunk * 8 + 8]
    assert not np.isnan(memory).any()  # every place is written: the swizzle is a permutation
    return memory


def accumulators(block: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Put a lane map of one 16x8 result into the matrix."""
    for lane in LANES:
        g, t = divmod(lane, 4)
        block[g, 2 * t : 2 * t + 2] = d[lane, :2]
        block[g + 8, 2 * t : 2 * t + 2] = d[lane, 2:]
    return block


# ---- tests -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_products(dim: int, rng: np.random.Generator) -> None:
    """S = Q K^T and O = P V, through the swizzled tiles and the three lane maps, equal the products; P's accumulators serve as the A fragments."""
    q, k, v = rng.standard_normal((16, dim)), rng.standard_normal((16, dim)), rng.standard_normal((16, dim))
    row_bytes = dim * 2
    q_tile, k_tile, v_tile = store_tile(q), store_tile(k), store_tile(v)
    a_lane, b_lane = lane_offset("lane_offset_a", row_bytes), lane_offset("lane_offset_b", row_bytes)
    scores = np.zeros((2, 32, 4))
    for step in range(dim // 16):
        a = ldmatrix(q_tile, swizzled_step(a_lane, step * 16))
        b = ldmatrix(k_tile, swizzled_step(b_lane, step * 16))
        scores[0] += mma(a, b[:, 0:2])
        scores[1] += mma(a, b[:, 2:4])
    s = np.concatenate([accumulators(np.empty((16, 8)), d) for d in scores], axis=1)
    np.testing.assert_allclose(s, q @ k.T, atol=1e-12)

    # p[2 * half + h] = the pair of row g + 8 h in key block `half` (AttentionTile::accumulate)
    p = np.stack([scores[half][:, 2 * h : 2 * h + 2] for half in range(2) for h in range(2)], axis=1)
    out = np.empty((16, dim))
    for pair in range(dim // 16):
        b = ldmatrix(v_tile, swizzled_step(a_lane, pair * 16), trans=True)
        accumulators(out[:, pair * 16 : pair * 16 + 8], mma(p, b[:, 0:2]))
        accumulators(out[:, pair * 16 + 8 : pair * 16 + 16], mma(p, b[:, 2:4]))
    np.testing.assert_allclose(out, s @ v, atol=1e-11)


def fp8_pairs(text: str, name: str) -> int:
    """The selector of a __byte_perm in a header, by what its line assigns or contains."""
    return int(re.search(name + r".*?0x([0-9a-f]+)\)", text)[1], 16)


def byte_perm(x: np.ndarray, selector: int) -> np.ndarray:
    """__byte_perm(x, 0, selector) of arrays whose last axis is 4 bytes; zeros are byte 4..7."""
    padded = np.concatenate([x, np.zeros_like(x)], axis=-1)
    return padded[..., [selector >> 4 * i & 7 for i in range(4)]]


@pytest.mark.parametrize("dim", [64, 128, 256, 112, 48, 80])
def test_products_8bit(dim: int, rng: np.random.Generator) -> None:
    """The same with 8-bit K and V: one ldmatrix is 16 keys x 32 dims, queries are permuted within 16 columns, output columns come back in place."""
    text = (SOURCES / "attention_tile.cuh").read_text()
    steps, pitch = -(-dim // 16), -(-dim // 128) * 128
    q, k, v = (rng.integers(-8, 9, (16, dim)).astype(float) for _ in range(3))

    def store_bytes(values: np.ndarray) -> np.ndarray:
        """A tile of 1-byte elements, two of them as the halves (real, imaginary) of a 2-byte unit."""
        memory = np.zeros(16 * pitch // 2, complex)
        for row in range(16):
            for chunk in range(dim // 16):
                at = int(swizzled_offset(pitch)(row, chunk)) // 2
                part = values[row, chunk * 16 : chunk * 16 + 16]
                memory[at : at + 8] = part[::2] + 1j * part[1::2]
        return memory

    # The queries' permutation, as permute_queries moves 4-byte pairs: first = a.x a.z b.x b.z, second = a.y a.w b.y b.w.
    moves = re.findall(r"(first|second)\.([xyzw]) = ([ab])\.([xyzw])", text)
    assert len(moves) == 8
    permuted = np.empty_like(q)
    for step in range(steps):
        for half, to, source, at in moves:
            target = step * 8 + 4 * (half == "second") + "xyzw".index(to)
            origin = step * 8 + 4 * (source == "b") + "xyzw".index(at)
            permuted[:, 2 * target : 2 * target + 2] = q[:, 2 * origin : 2 * origin + 2]
    q_pitch = -(-dim * 2 // 128) * 128
    q_tile = store_tile(np.concatenate([permuted, np.zeros((16, q_pitch // 2 - dim))], axis=1))
    k_tile, v_tile = store_bytes(k), store_bytes(v)
    q_lane, kv_lane = lane_offset("lane_offset_a", q_pitch), lane_offset("lane_offset_a", pitch)

    def as_bytes(units: np.ndarray) -> np.ndarray:
        """[lane, matrix, 2] complex units -> [lane, matrix, 4] bytes in memory order."""
        return np.stack([units.real, units.imag], axis=-1).reshape(32, 4, 4)

    scores = np.zeros((2, 32, 4))
    for pair in range(0, steps, 2):
        chunk = as_bytes(ldmatrix(k_tile, swizzled_step(kv_lane, pair * 8)))
        for i in range(4):
            if pair + i // 2 < steps:
                a = ldmatrix(q_tile, swizzled_step(q_lane, (pair + i // 2) * 16))
                scores[i % 2] += mma(a, chunk[:, i].reshape(32, 2, 2))  # lo is b0, hi is b1
    s = np.concatenate([accumulators(np.empty((16, 8)), d) for d in scores], axis=1)
    np.testing.assert_allclose(s, q @ k.T, atol=1e-12)

    column = re.search(r"return VALUE_8BIT \? (.*?) :", text)[1].replace("/", "//")
    selector = fp8_pairs(text, r"__byte_perm\(b\[2 \* i\]")
    p = np.stack([scores[half][:, 2 * h : 2 * h + 2] for half in range(2) for h in range(2)], axis=1)
    out = np.full((16, steps * 16), np.nan)
    for chunks in range(0, steps, 2):
        b = as_bytes(ldmatrix(v_tile, swizzled_step(kv_lane, chunks * 8), trans=True))
        for i in range(2):
            if chunks + i < steps:
                first, second = byte_perm(b[:, 2 * i], selector), byte_perm(b[:, 2 * i + 1], selector)
                for odd in range(2):
                    both = np.stack([first[:, 2 * odd : 2 * odd + 2], second[:, 2 * odd : 2 * odd + 2]], axis=1)
                    found = mma(p, both)
                    for lane in LANES:
                        g, t = divmod(int(lane), 4)
                        for e in range(2):
                            at = eval(column, {"d": 2 * (chunks + i) + odd, "t": t, "e": e})
                            out[g, at], out[g + 8, at] = found[lane, e], found[lane, 2 + e]
    np.testing.assert_allclose(out[:, :dim], s @ v, atol=1e-9)


def test_e4m3_by_bits() -> None:
    """The integer conversion for devices without the instruction, for all 256 values: bit for bit what the format says, NaN included."""
    text = (SOURCES / "fp8.cuh").read_text()
    assert "(magnitude + 0x01000100u) & 0x80008000u" in text and "r | (nan - (nan >> 15))" in text
    byte = np.arange(256, dtype=np.uint32)
    spread = byte_perm(np.stack([byte, byte[::-1], 0 * byte, 0 * byte], -1), fp8_pairs(text, "spread = __byte_perm"))
    spread = (spread.astype(np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)).sum(-1).astype(np.uint32)
    magnitude = spread & 0x7F007F00
    nan = (magnitude + 0x01000100) & 0x80008000
    want = byte.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for kind, shift, power in (("float16", 1, 8), ("bfloat16", 4, 120)):
        assert f"(magnitude >> {shift})" in text and f"2^{power}" in text
        dtype = np.float16 if kind == "float16" else ml_dtypes.bfloat16
        small = ((spread & 0x80008000) | (magnitude >> shift)).view(np.uint16).view(dtype).astype(np.float64)
        bits = (small * 2.0**power).astype(np.float32).astype(dtype).view(np.uint16).view(np.uint32)
        got = (bits | (nan - (nan >> 15))).view(np.uint16).view(dtype).astype(np.float32).reshape(256, 2)
        np.testing.assert_array_equal(got[:, 0], want)
        np.testing.assert_array_equal(got[:, 1], want[::-1])
        finite = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[:, 0])[finite], np.signbit(want)[finite])


@pytest.mark.parametrize(("dim", "itemsize"), [(72, 2), (96, 2), (8, 2), (200, 2), (72, 1), (104, 1), (256, 1)])
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_copy_matrix(dim: int, itemsize: int, rows: int) -> None:
    """The general copy writes every chunk of every row once, up to whole steps of 16 columns, and reads exactly the row's bytes."""
    text = (SOURCES / "paged_kv.cuh").read_text().split("PYINFER_DEVICE void copy_matrix")[1]
    row_of, chunk_of = re.search(r"row = (.*?);", text)[1], re.search(r"chunk = (.*?);", text)[1]
    chunks = -(-dim // 16) * itemsize
    read = re.search(r"bytes = row < valid_rows \? (.*?) : 0;", text)[1]
    seen: dict[tuple[int, int], int] = {}
    for i in range(-(-rows * chunks // 32)):
        for lane in range(32):
            scope = {"i": i, "lane": lane, "CHUNKS": chunks, "max_of": max, "min_of": min, "BYTES": dim * itemsize}
            row, chunk = (eval(e.replace("/", "//"), scope) for e in (row_of, chunk_of))
            if row < rows:
                assert (row, chunk) not in seen
                seen[row, chunk] = eval(read, scope | {"chunk": chunk})
    assert len(seen) == rows * chunks
    assert all(sum(seen[row, chunk] for chunk in range(chunks)) == dim * itemsize for row in range(rows))


def banks_touched(addresses: np.ndarray) -> int:
    """Distinct 16-byte bank groups of 8 lanes that access 16 bytes each: 8 is free of conflicts."""
    return len(set((addresses // 16 % 8).tolist()))


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_no_bank_conflicts(row_bytes: int) -> None:
    """ldmatrix (8 rows at one column) and cp.async (8 lanes along a row, or along two) touch every bank once."""
    for name in ("lane_offset_a", "lane_offset_b"):
        lanes = lane_offset(name, row_bytes)
        for step in range(row_bytes // 32):
            addresses = swizzled_step(lanes, step * 16)
            assert all(banks_touched(addresses[i : i + 8]) == 8 for i in range(0, 32, 8))
    chunks = row_bytes // 16
    offset = swizzled_offset(row_bytes)
    for begin in range(0, 8 * chunks, 8):
        index = np.arange(begin, begin + 8)
        assert banks_touched(offset(index // chunks, index % chunks)) == 8


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_steps_along_a_row(row_bytes: int) -> None:
    """swizzled_step from (row, chunk) reaches (row, chunk + columns / 8), wherever the tile lies."""
    offset = swizzled_offset(row_bytes)
    for row in range(16):
        for half in range(2):
            for step in range(row_bytes // 32):
                assert swizzled_step(1024 + offset(row, half), step * 16) == 1024 + offset(row, half + 2 * step)
        assert offset(row + 16, 3) == offset(row, 3) + 16 * row_bytes


@pytest.mark.parametrize("row_bytes", [128, 256, 512])
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_copy_rows(row_bytes: int, rows: int) -> None:
    """The lane addresses of copy_rows' fast path: every chunk of every row goes to its swizzled place, once, and the row index is right."""
    text = (SOURCES / "paged_kv.cuh").read_text()
    place = re.search(r"place = (\(lane_tile.*);", text)[1].replace("/", "//")
    source_row = re.search(r"lane_row_offset, (i \* STEP_ROWS \+ lane_row)\)", text)[1]
    valid = re.search(r"(i \* STEP_ROWS < lane_valid)", text)[1]
    chunks = row_bytes // 16
    scope = {"STEP_ROWS": 32 // chunks, "ROW_BYTES": row_bytes}
    offset = swizzled_offset(row_bytes)
    lane_row = LANES // chunks
    seen: set[tuple[int, int]] = set()
    for i in range(rows * chunks // 32):
        row = eval(source_row, scope | {"i": i, "lane_row": lane_row})
        at = eval(place, scope | {"i": i, "lane_tile": 2048 + offset(lane_row, LANES % chunks)})
        np.testing.assert_array_equal(at, 2048 + offset(row, LANES % chunks))
        np.testing.assert_array_equal(eval(valid, scope | {"i": i, "lane_valid": 5 - lane_row}), row < 5)
        seen |= set(zip(row.tolist(), (LANES % chunks).tolist(), strict=True))
    assert seen == {(r, c) for r in range(rows) for c in range(chunks)}


def test_divisions(rng: np.random.Generator) -> None:
    """fast_divide with the host's constants is exact for every 31-bit number."""
    fast_divide = c_function("paged_kv.cuh", "fast_divide", "n, magic, shift")
    divisors = [
        *range(1, 130),
        256,
        1000,
        4096,
        65535,
        65536,
        (1 << 30) - 1,
        1 << 30,
        (1 << 31) - 1,
        *rng.integers(1, 1 << 31, 200).tolist(),
    ]
    for d in divisors:
        magic, shift = divisor(d)
        assert magic < 1 << 32
        numbers = {
            0,
            1,
            d - 1,
            d,
            d + 1,
            (1 << 31) - 1,
            (1 << 31) - 2,
            ((1 << 31) - 1) // d * d,
            max(((1 << 31) - 1) // d * d - 1, 0),
            *rng.integers(0, 1 << 31, 50).tolist(),
        }
        for n in numbers:
            if n < 1 << 31:
                assert fast_divide(n, magic, shift) == n // d, (n, d)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [-1, 0, 3, 1 << 30])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 9), (5, 5), (4, 11), (7, 3), (3, 0)])
def test_visibility(causal: bool, window: int, qo_len: int, kv_len: int) -> None:
    """RowVisibility's range is the definition of causality (bottom right), window and length; the mask test in mask_scores is membership in it."""
    scope = {
        "window_left": window,
        "diagonal": kv_len - qo_len,
        "kv_end": kv_len,
        "causal": causal,
        "min_of": min,
        "max_of": max,
    }
    text = (SOURCES / "attention_variant.cuh").read_text()

    def bound(name: str, token: int) -> int:
        condition, yes, no = re.search(
            r"int " + name + r"\(int token\) const \{\s*return (.*?) \? (.*?) : (.*?);", text, re.DOTALL
        ).groups()
        return eval(f"({yes}) if ({condition}) else ({no})", scope | {"token": token})

    for token in range(qo_len):
        begin, end = bound("begin", token), bound("end", token)
        span = max(end - begin, 0)
        for key in range(kv_len + 3):
            visible = (
                key < kv_len
                and (not causal or key <= kv_len - qo_len + token)
                and (window < 0 or key >= kv_len - qo_len + token - window)
            )
            assert (((key - begin) & 0xFFFFFFFF) < span) == visible, (token, key)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 71, 128])
def test_packed_rows(group: int) -> None:
    """Packed row r of kv head h is token r // group, head h * group + r % group: with merge.cuh's expressions every (token, head) is met once."""
    fast_divide = c_function("paged_kv.cuh", "fast_divide", "n, magic, shift")
    magic, shift = divisor(group)
    assert "w.kv_head * p.group + packed - token * p.group" in (SOURCES / "merge.cuh").read_text()
    met = set()
    for kv_head in range(2):
        for packed in range(5 * group):
            token = fast_divide(packed, magic, shift)
            met.add((token, kv_head * group + packed - token * group))
    assert met == {(token, head) for token in range(5) for head in range(2 * group)}
