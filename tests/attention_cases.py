"""Inputs of attention tests: shapes drawn from generators, caches poisoned wherever no kernel may look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.arrays import EPSILON, Backend
from tests.reference.attention import attention, gather_pages


def dtypes(device: str) -> tuple[str, ...]:
    return ("float16", "bfloat16") if device == "cuda" else ("float32", "float16", "bfloat16")


def tolerance(dtype: str, device: str) -> dict[str, float]:
    """One rounding of the result on the CPU, which computes in float32; the GPU also rounds the weights to the type."""
    return {"rtol": EPSILON[dtype] * (4 if device == "cuda" else 1.01) + 4e-6, "atol": 1e-6}


def lse_tolerance(device: str) -> dict[str, float]:
    return {"rtol": 2e-6, "atol": 1e-3 if device == "cuda" else 2e-5}


@dataclass
class Paged:
    """A paged cache with its page table; `k`, `v` hold each request's keys and values as float64, rounded to the type."""

    cache: Any
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    lens: np.ndarray
    page_size: int
    layout: str


@dataclass
class Shape:
    """What a case is made of."""

    dtype: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    layout: str = "NHD"
    form: str = "tuple"  # tuple | combined | strided
    lens: tuple[int, ...] = (0, 1, 16, 17, 45)
    qo_lens: tuple[int, ...] = (1, 1, 1, 1, 1)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f"-{k}={v}" for k, v in self.options.items())
        return f"{self.dtype}-{self.num_qo_heads}h{self.num_kv_heads}-d{self.head_dim}-p{self.page_size}-{self.layout}-{self.form}{options}"


def shapes(device: str, seed: int, count: int, *, prefill: bool) -> list[Shape]:
    """`count` cases that together contain every group size, head dimension, page size, layout, form and dtype."""
    rng = np.random.default_rng(seed)
    groups = [1, 2, 3, 4, 7, 8]
    found = []
    for i in range(count):
        group = groups[i % len(groups)]
        kv_heads = int(rng.integers(1, 4))
        page_size = (16, 1, 3)[i % 3]
        edge = [0, 1, page_size, page_size + 1, 2 * page_size - 1 + (page_size == 1)]
        lens = [*edge, *rng.integers(1, 150, 3).tolist()]
        rng.shuffle(lens)
        if prefill:  # empty requests, more queries than keys, one query, and rows enough for several tiles
            qo = [int(rng.integers(0, 2 * n + 2)) if i % 2 else int(rng.integers(0, max(n, 1) + 1)) for n in lens]
            options = [
                {"causal": True},
                {},
                {"causal": True, "window_left": 7},
                {"causal": True, "logits_soft_cap": 3.0},
            ]
            options += [{"window_left": 20}, {"causal": True, "sm_scale": 0.3}]
        else:
            qo = [1] * len(lens)
            options = [{}, {"window_left": 0}, {"logits_soft_cap": 2.0}, {"window_left": 37}, {"sm_scale": 0.2}]
        found.append(
            Shape(
                dtypes(device)[i % len(dtypes(device))], group * kv_heads, kv_heads, (64, 128, 256)[(i // 2) % 3], page_size, ("NHD", "HND")[(i // 3) % 2],
                ("tuple", "combined", "strided")[(i + i // 3) % 3], tuple(lens), tuple(qo), options[i % len(options)],
            )
        )  # fmt: skip
    return found


def page_table(
    rng: np.random.Generator, lens: Any, page_size: int, spare: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(indptr, indices, last_page_len, pages in the cache) with shuffled pages, `spare` of them used by nobody."""
    lens = np.asarray(lens, np.int64)
    pages = -(-lens // page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    total = int(indptr[-1]) + spare
    indices = rng.permutation(total)[: indptr[-1]].astype(np.int32)
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 0).astype(np.int32)
    return indptr, indices, last, total


def strided(backend: Backend, values: np.ndarray, dtype: str, rng: np.random.Generator) -> Any:
    """A tensor of these values whose outer axes lie at odd strides inside a larger one (multiples of 16 bytes: what the GPU copies by)."""
    grown = [n + int(rng.integers(1, 3)) for n in values.shape[:-1]]
    big = np.full((*grown, values.shape[-1] + 8), np.nan)
    window = tuple(slice(0, n) for n in values.shape)
    big[window] = values
    return backend.array(big, dtype)[window]


def paged_cache(rng: np.random.Generator, backend: Backend, shape: Shape, *, magnitude: float = 1.0) -> Paged:
    """Random keys and values in shuffled pages. Slots that belong to no token are NaN."""
    indptr, indices, last, pages = page_table(rng, shape.lens, shape.page_size)
    heads, d, ps = shape.num_kv_heads, shape.head_dim, shape.page_size
    dims = (pages, ps, heads, d) if shape.layout == "NHD" else (pages, heads, ps, d)
    full = []
    for _ in range(2):
        cache = np.full(dims, np.nan)
        for b, n in enumerate(shape.lens):
            for i, page in enumerate(indices[indptr[b] : indptr[b + 1]]):
                used = min(ps, n - i * ps)
                slot = (page, slice(0, used)) if shape.layout == "NHD" else (page, slice(None), slice(0, used))
                cache[slot] = magnitude * rng.standard_normal(cache[slot].shape)
        full.append(cache)
    if shape.form == "combined":
        cache: Any = backend.array(np.stack(full, 1), shape.dtype)
        k64, v64 = backend.float64(cache)[:, 0], backend.float64(cache)[:, 1]
    else:
        if shape.form == "strided":
            cache = tuple(strided(backend, x, shape.dtype, rng) for x in full)
        else:
            cache = tuple(backend.array(x, shape.dtype) for x in full)
        k64, v64 = (backend.float64(x) for x in cache)
    if ps == 1 and shape.form == "tuple":  # the page axis may be left out
        cache = tuple(x.reshape(pages, heads, d) for x in cache)
    batch = range(len(shape.lens))
    k = [gather_pages(k64, shape.layout, indptr, indices, last, b) for b in batch]
    v = [gather_pages(v64, shape.layout, indptr, indices, last, b) for b in batch]
    return Paged(cache, indptr, indices, last, k, v, np.asarray(shape.lens), ps, shape.layout)


def expected(
    q: np.ndarray, qo_lens: Any, k: list[np.ndarray], v: list[np.ndarray], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 reference of a batch: q [rows, heads, dim], one request after another."""
    outs, lses, row = [], [], 0
    for n, keys, values in zip(qo_lens, k, v, strict=True):
        out, lse = attention(q[row : row + n], keys, values, **options)
        outs.append(out)
        lses.append(lse)
        row += n
    return np.concatenate(outs), np.concatenate(lses)
