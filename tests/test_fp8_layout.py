"""The index maps of the fp8 prefill kernel, without a GPU: values turned around in shared memory, and the order of keys in which weights meet them.

The expressions are those of the CUDA headers, evaluated here; ldmatrix, stmatrix and wgmma's fragments are written from the PTX ISA.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.compile

COMMON = Path(__file__).resolve().parents[1] / "cuda_src" / "common"
TRANSPOSE = (COMMON / "transpose_fp8.cuh").read_text()
SOFTMAX = (COMMON / "softmax_fp8.cuh").read_text()
ROW = 128  # bytes of a row of a swizzled tile


def python(expression: str) -> str:
    """A C expression of ints as Python's: both divide what is not negative in the same way, and bind alike."""
    expression = re.sub(r"\b(0x[0-9a-f]+|\d+)u\b", r"\1", expression).replace(" / ", " // ")
    return re.sub(r"(.+) \? (.+) : (.+)", r"(\2) if \1 else (\3)", expression)


def declared(text: str, name: str) -> str:
    """The expression that a name is declared with."""
    found = re.search(r"(?:const )?(?:int|uint32_t) " + name + r" = ([^;,]+)[;,]", text)
    assert found, name
    return python(found[1])


def swizzled(row: int, chunk: int) -> int:
    """Where TMA puts 16-byte chunk `chunk` of a row, and where wgmma looks for it."""
    return row * ROW + (chunk ^ row % 8) * 16


def load_transposed(memory: np.ndarray, addresses: list[int]) -> np.ndarray:
    """ldmatrix.x4.trans: [lane, matrix, byte]."""
    out = np.zeros((32, 4, 4), memory.dtype)
    for lane, matrix in np.ndindex(32, 4):
        for i in range(2):
            at = addresses[8 * matrix + 2 * (lane % 4) + i] + 2 * (lane // 4)
            out[lane, matrix, 2 * i : 2 * i + 2] = memory[at : at + 2]
    return out


def store(memory: np.ndarray, addresses: list[int], words: np.ndarray) -> None:
    """stmatrix.x4 of words [lane, matrix, byte]; the eight rows of a matrix must lie in eight different groups of banks."""
    for matrix in range(4):
        assert len({addresses[8 * matrix + row] // 16 % 8 for row in range(8)}) == 8
    for lane, matrix in np.ndindex(32, 4):
        at = addresses[8 * matrix + lane // 4] + 4 * (lane % 4)
        memory[at : at + 4] = words[lane, matrix]


def permuted(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """prmt: four bytes of eight."""
    both = np.concatenate([a, b])
    return both[[selector >> 4 * i & 7 for i in range(4)]]


def transposed(values: np.ndarray, valid: int) -> np.ndarray:
    """What both warps leave in shared memory of values [keys, columns]: bytes as numbers, -1 where nothing was written."""
    keys, columns = values.shape
    scope: dict[str, Any] = {"FROM_BLOCK": keys * ROW, "TO_BLOCK": columns * ROW, "fresh_lane": int}
    source = np.zeros(scope["FROM_BLOCK"] * -(-columns // 128), np.int64)
    for key, column in np.ndindex(keys, columns):
        source[column // 128 * scope["FROM_BLOCK"] + swizzled(key, column % 128 // 16) + column % 16] = values[
            key, column
        ]
    target = np.full(scope["TO_BLOCK"] * -(-keys // 128), -1, np.int64)
    store_at = re.search(r"store_matrices_4\((.+), y\);", TRANSPOSE)
    load_at = re.search(r"ldmatrix_x4_trans\(x, (.+)\);", TRANSPOSE)
    assert store_at and load_at
    pairs = re.findall(r"__byte_perm\(x\[(\d)\], x\[(\d)\], ([^)]+)\)", TRANSPOSE)
    assert len(pairs) == 4
    for c in range(0, columns, 32):
        for block in range(keys // 16):
            loads, stores, selectors = [], [], []
            for lane in range(32):
                at = scope | {"lane": lane, "c": c, "block": block, "from": 0, "to": 0}
                for name in ("matrix", "row", "load_row", "column", "store_row", "selector", "source", "target"):
                    expression = declared(TRANSPOSE, name).replace("from + ", "")
                    at[name] = eval(expression, {}, at)
                loads.append(eval(python(load_at[1]), {}, at))
                stores.append(eval(python(store_at[1]), {}, at))
                selectors.append(at["selector"])
            x = load_transposed(source, loads)
            left = valid - block * 16
            for lane in range(32):
                for m in range(4):
                    first = lane % 4 * 2 + m % 2 * 8
                    keep = 4 if first + 1 < left else 2 if first < left else 0
                    x[lane, m, keep:] = 0
            y = np.zeros_like(x)
            for lane in range(32):
                for m, (a, b, how) in enumerate(pairs):
                    selector = eval(python(how), {}, {"selector": selectors[lane]})
                    y[lane, m] = permuted(x[lane, int(a)], x[lane, int(b)], selector)
            store(target, stores, y)
    return target


ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Keys within 16 as the products contract them."""


@pytest.mark.parametrize(
    "keys,columns,valid", [(96, 128, 96), (96, 128, 37), (160, 128, 160), (128, 64, 5), (64, 256, 0)]
)
def test_values_are_turned_around(keys, columns, valid):
    values = np.arange(1, keys * columns + 1).reshape(keys, columns)
    found = transposed(values, valid)
    place = np.arange(keys)
    key = place // 16 * 16 + np.array(ORDER)[place % 16]
    for column in range(columns):
        at = [
            place_of // 128 * columns * ROW + swizzled(column, place_of % 128 // 16) + place_of % 16
            for place_of in place
        ]
        np.testing.assert_array_equal(found[at], np.where(key < valid, values[key, column], 0))
    assert " ".join(map(str, ORDER)) in TRANSPOSE


def test_the_mask_of_the_last_keys():
    """`keep` of the header is what `transposed` above does by hand."""
    expression = re.search(r"keep = \[&\]\(int key\) \{ return (.+); \};", TRANSPOSE)
    assert expression
    first, rest = expression[1].split(" ? ", 1)
    full, second = rest.split(" : ", 1)
    code = f"({python(full)}) if {first} else ({python(second)})"
    for valid in range(-3, 18):
        for key in range(0, 16, 2):
            kept = eval(code, {}, {"key": key, "valid_keys": valid})
            assert kept == {0: 0, 1: 0xFFFF, 2: 0xFFFFFFFF}[min(max(valid - key, 0), 2)]
    assert re.search(r"low = keep\(lane % 4 \* 2\), high = keep\(lane % 4 \* 2 \+ 8\)", TRANSPOSE)


def test_weights_meet_their_values():
    """Words of the left operand, made of the accumulators where they lie, hold the weights of `ORDER`'s keys at the places of a k32 fragment."""
    packed = re.search(r"packed\[n / 4\]\[n % 4 \+ h\] = pack_e4m3x4\((.+)\);", SOFTMAX)
    assert packed
    sources = re.findall(r"weight\[(n(?: \+ 1)?)\]\[2 \* h(?: \+ (1))?\]", packed[1])
    assert len(sources) == 4
    for lane in range(32):
        row, t = lane // 4, lane % 4
        for n in (0, 2):
            for h in range(2):
                word = n % 4 + h
                # PTX ISA, m64k32 of 8 bits: word i holds row g + 8 * (i % 2), columns 4t .. 4t + 3 of 16, + 16 * (i / 2).
                assert row + 8 * h == row + 8 * (word % 2)
                for byte, (block, second) in enumerate(sources):
                    key = (
                        8 * eval(block, {}, {"n": n}) + 2 * t + int(second or 0)
                    )  # accumulator [block][2h + second] is of this key
                    assert key == word // 2 * 16 + ORDER[4 * t + byte]
