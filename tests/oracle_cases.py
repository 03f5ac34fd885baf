"""Inputs and calls of the oracle grid: for every operator, how a case is drawn, run and what the float64 reference makes of it.

Slots of a cache that belong to no token, and rows of an output before a run, are NaN.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import pyinfer
from tests import attention_cases
from tests.arrays import EPSILON, NUMPY_DTYPES, Backend
from tests.oracle_grid import Case
from tests.reference.attention import Exact, attention_with_bounds

ROPE = (2.0, 5e3)
SCALES = {"q": 0.5, "k": 1.5, "v": -2.0}
MLA_SCALE = (128 + 64) ** -0.5
FP8 = ("float8_e4m3fn", "float8_e5m2")
# (query, kv) lengths. Every kind has its empty request, its single key and more queries than keys, but for "long".
SHAPES = {
    "mixed": ((2, 0), (1, 1), (9, 37), (40, 90), (0, 5), (7, 130)),
    "decode": ((1, 0), (1, 1), (1, 16), (1, 17), (1, 45), (1, 200)),
    "short": ((9, 3), (40, 1), (5, 0), (33, 20)),
    "long": ((34, 700), (1, 3), (2, 64)),
    "shared": ((5, 70), (1, 64), (20, 70), (0, 0), (36, 33), (3, 1)),
}
ONE = {"mixed": (40, 90), "decode": (1, 200), "short": (40, 3), "long": (34, 700), "shared": (36, 33)}


def refused(error: Exception) -> bool:
    """Whether an operator said that the kernel family asked for does not do the case, or the GPU."""
    return any(
        text in str(error)
        for text in ("backend has no kernel for", "backend needs a Hopper GPU", "is not covered by backend 'fa3'")
    )


class Wanted(NamedTuple):
    """What a result should be: the reference, the result's dtype, and how often it was rounded to the queries' on the way."""

    exact: Exact
    dtype: str
    roundings: int = 0


class Prepared(NamedTuple):
    """A case ready to run: `run()` gives a list of (out, lse or None), `wanted` what they should be."""

    run: Callable[[], list[tuple[Any, Any]]]
    wanted: list[Wanted]


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values as they are after rounding to a dtype."""
    return x.astype(NUMPY_DTYPES.get(dtype) or np.dtype(dtype)).astype(np.float64)


def joined(parts: list[Exact]) -> Exact:
    """The references of several requests, one after another."""
    return Exact(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def indptr_of(lens: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lens, np.int64))]).astype(np.int32)


def packed(mask: np.ndarray) -> np.ndarray:
    """The mask in little-endian bits."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unaligned(backend: Backend, values: np.ndarray, dtype: str) -> Any:
    """A tensor of these values whose address and strides are no multiples of 16 bytes."""
    big = np.full((*(n + 1 for n in values.shape[:-1]), values.shape[-1] + 3), np.nan)
    window = (*(slice(0, n) for n in values.shape[:-1]), slice(1, 1 + values.shape[-1]))
    big[window] = values
    return backend.array(big, dtype)[window]


@dataclass
class Table:
    """A page table and what lies behind it: float64 keys and values of every request, rounded to the type."""

    cache: Any
    indptr: np.ndarray
    indices: np.ndarray
    last: np.ndarray
    lens: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]


class Draw:
    """The inputs of one case. `extreme`: scores of +-1e30 (as far as the types reach); `empty`: no request has a key."""

    def __init__(self, case: Case, rng: np.random.Generator, device: str, *, extreme: bool = False, empty: bool = False) -> None:  # fmt: skip
        native = case.framework == "native" and not (device == "cuda" and case.kv_dtype in FP8)  # CuPy has no fp8
        framework = {"cpu": "numpy", "cuda": "cupy"}[device] if native else "torch"
        self.case, self.rng, self.device, self.empty = case, rng, device, empty
        self.b = Backend(framework, device)
        self.q_size = self.k_size = 1.0
        if extreme:
            k = {"float16": 1e4, "float8_e4m3fn": 60.0, "float8_e5m2": 1e4}.get(case.kv_dtype, 1e15)
            self.k_size = 1.0 if case.op.startswith("mla") else k  # a latent row is also the value
            self.q_size = 1e4 if case.dtype == "float16" else 1e29 / self.k_size

    # ---- numbers
    def normal(self, shape: Any, size: float = 1.0) -> np.ndarray:
        return size * self.rng.standard_normal(shape)

    def lengths(self, decode: bool = False) -> tuple[list[int], list[int]]:
        """Query and kv lengths of a batch: the shape's, some a little longer, in any order."""
        pairs = [list(x) for x in SHAPES[self.case.shape]]
        for pair in pairs:
            if decode:
                pair[0] = 1
            elif self.case.group > 16:
                pair[0] = min(pair[0], 5)
                pair[1] = min(pair[1], 300)
            if pair[1] > 3:
                pair[1] += int(self.rng.integers(0, 4))
        qo, kv = (list(x) for x in zip(*(pairs[i] for i in self.rng.permutation(len(pairs))), strict=True))
        return qo, [0] * len(kv) if self.empty else kv

    def one(self) -> tuple[int, int]:
        """Query and kv length of a single request."""
        qo, kv = ONE[self.case.shape]
        if self.case.group > 16:
            qo, kv = min(qo, 5), min(kv, 300)
        return qo, 0 if self.empty else kv

    # ---- tensors
    def tensor(self, values: np.ndarray, dtype: str, form: str | None = None) -> Any:
        form = self.case.form if form is None else form
        if form == "strided":
            return attention_cases.strided(self.b, values, dtype, self.rng)
        if form == "unaligned":
            return unaligned(self.b, values, dtype)
        return self.b.array(values, dtype)

    def queries(self, rows: int, heads: int | None = None, dim: int | None = None) -> tuple[Any, np.ndarray]:
        c = self.case
        values = self.normal((rows, heads or c.heads, dim or c.dims[0]), self.q_size)
        return self.tensor(values, c.dtype), rounded(values, c.dtype)

    def dense(self, tokens: int) -> tuple[Any, Any, np.ndarray, np.ndarray]:
        """Keys and values in the case's layout, and in float64 by token."""
        c, found = self.case, []
        for dim, size in zip(c.dims, (self.k_size, 1.0), strict=True):
            values = self.normal((tokens, c.kv_heads, dim), size)
            placed = values if c.layout == "NHD" else values.swapaxes(0, 1)
            found.append((self.tensor(placed, c.kv_dtype), rounded(values, c.kv_dtype)))
        (k, k64), (v, v64) = found
        return k, v, k64, v64

    def paged(self, lens: list[int]) -> Table:
        """A paged cache with shuffled pages; with the shape "shared" requests have pages in common, and one has a page twice."""
        c, rng = self.case, self.rng
        ps, counts = c.page, [-(-n // c.page) for n in lens]
        fresh = rng.permutation(sum(counts) + 3).tolist()
        pages: list[list[int]] = []
        for n in counts:
            own: list[int] = []
            if c.shape == "shared" and n:
                if pages:
                    own = pages[int(rng.integers(len(pages)))][: n - 1]
                if len(own) >= 2:
                    own[-1] = own[0]
            pages.append(own + [fresh.pop() for _ in range(n - len(own))])
        indices = np.array([p for own in pages for p in own], np.int32)
        last = np.array([n - (m - 1) * ps if m else 0 for n, m in zip(lens, counts, strict=True)], np.int32)
        total = sum(counts) + 3
        used = np.zeros((total, ps), bool)
        for own, n in zip(pages, lens, strict=True):
            for i, page in enumerate(own):
                used[page, : n - i * ps] = True
        full, split = [], []
        for dim, size in zip(c.dims, (self.k_size, 1.0), strict=True):
            values = np.full((total, ps, c.kv_heads, dim), np.nan)
            values[used] = self.normal((int(used.sum()), c.kv_heads, dim), size)
            rows = [values[own].reshape(len(own) * ps, c.kv_heads, dim)[:n] for own, n in zip(pages, lens, strict=True)]
            split.append([rounded(x, c.kv_dtype) for x in rows])
            full.append(values if c.layout == "NHD" else values.swapaxes(1, 2))
        if c.form == "combined":
            cache: Any = self.b.array(np.stack(full, 1), c.kv_dtype)
        else:
            cache = tuple(self.tensor(x, c.kv_dtype) for x in full)
        return Table(cache, indptr_of(counts), indices, last, np.array(lens, np.int32), *split)

    def metadata(self, x: np.ndarray) -> Any:
        """A table as plan() gets it."""
        if self.case.index == "list":
            return x.tolist()
        if self.case.index == "device":
            return self.b.array(x)
        return x.astype(self.case.index)

    def workspace(self) -> Any:
        if self.case.workspace == "own":
            return None
        if self.b.framework == "torch":
            import torch

            return torch.empty(64 << 20, dtype=torch.uint8, device=self.device)
        if self.b.framework == "cupy":
            import cupy

            return cupy.empty(64 << 20, np.uint8)
        return np.empty(64 << 20, np.uint8)

    # ---- options
    @property
    def sm_scale(self) -> float | None:
        if self.case.op.startswith("mla"):
            return MLA_SCALE
        return 1.5 / math.sqrt(self.case.dims[0]) if self.case.scale == "given" else None

    def scales(self, *names: str) -> dict[str, Any]:
        """Run-time scales by the operator's names for them; the last letters before or after the underscore say which."""
        kind = self.case.scales
        if kind == "none":
            return {}
        values = {name: SCALES["qkv"["qkv".index(name.replace("scale", "").strip("_"))]] for name in names}
        if kind == "tensors":
            return {name: self.b.array(np.array([x]), "float32") for name, x in values.items()}
        return values

    def scaled(self, sm_scale: float | None, *which: str) -> dict[str, float]:
        """The reference's scales, for run-time scales of these tensors."""
        scale = 1.0 / math.sqrt(self.case.dims[0]) if sm_scale is None else sm_scale
        if self.case.scales == "none":
            return {"sm_scale": scale, "v_scale": 1.0}
        for name in set(which) & {"q", "k"}:
            scale *= SCALES[name]
        return {"sm_scale": scale, "v_scale": SCALES["v"] if "v" in which else 1.0}

    def encoding(self) -> dict[str, Any]:
        """Arguments of plan() for the positional encoding."""
        if self.case.pos == "ROPE_LLAMA":
            return {"pos_encoding_mode": self.case.pos, "rope_scale": ROPE[0], "rope_theta": ROPE[1]}
        return {"pos_encoding_mode": self.case.pos}

    def options(self) -> dict[str, Any]:
        """The options of the reference that all requests share. A mask replaces causality, multi-item scoring includes it."""
        c = self.case
        rope = c.pos == "ROPE_LLAMA"
        epsilon = 2.0**-21 + (
            2 * EPSILON[c.dtype] if rope and self.device == "cuda" else 0
        )  # the GPU rounds what it rotated
        return {
            "causal": {"none": c.causal, "items": True}.get(c.mask, False), "window_left": c.window, "logits_soft_cap": c.cap, "alibi": c.pos == "ALIBI",
            "rope": ROPE if rope else None, "score_epsilon": epsilon,
        }  # fmt: skip

    def splits(self) -> dict[str, Any]:
        if self.case.split == "fixed":
            return {"fixed_split_size": 40 if self.case.page == 0 else max(1, 40 // self.case.page)}
        return {"disable_split_kv": True} if self.case.split == "never" else {}

    def sinks(self) -> tuple[Any, np.ndarray | None]:
        if not self.case.sinks:
            return None, None
        values = (2 * self.normal(self.case.heads)).astype(np.float32)
        values[:: max(3, len(values))] = -np.inf  # none for this head
        return self.b.array(values), values

    def masks(self, lengths: list[tuple[int, int]]) -> tuple[list[np.ndarray], list[dict[str, Any]], dict[str, Any]]:
        """(boolean masks, options of the reference for each request, arguments of plan())."""
        kind = self.case.mask
        if kind == "none":
            return [], [{} for _ in lengths], {}
        if kind == "items":
            return self._items(lengths)
        masks = [self.rng.random(x) < 0.6 for x in lengths]
        for mask in masks:
            if len(mask) > 2:
                mask[1] = False  # a row that sees nothing
        each = [{"mask": m} for m in masks]
        if kind == "bool":
            flat = np.concatenate([m.reshape(-1) for m in masks])
            return masks, each, {"custom_mask": self.b.array(flat)}
        bits = np.concatenate([packed(m) for m in masks])
        return masks, each, {"packed_custom_mask": self.b.array(bits) if self.case.index == "device" else bits}

    def _items(self, lengths: list[tuple[int, int]]) -> tuple[list[np.ndarray], list[dict[str, Any]], dict[str, Any]]:
        """A prefix, and behind it items of up to five tokens: for each token its place in its item, a delimiter (place 0) first."""
        longest = 64
        table = np.zeros((len(lengths), longest), np.uint16)
        prefixes, each = [], []
        for row, (_, kv) in zip(table, lengths, strict=True):
            prefix = int(self.rng.integers(0, kv + 1))
            places: list[int] = []
            while len(places) < kv - prefix:
                places += range(int(self.rng.integers(1, 6)))
            places = places[: min(kv - prefix, longest)]
            row[: len(places)] = places
            prefixes.append(prefix)
            each.append({"items": (prefix, places)})
        arguments: dict[str, Any] = {
            "prefix_len_ptr": np.array(prefixes, np.uint32), "token_pos_in_items_ptr": table.reshape(-1), "token_pos_in_items_len": longest,
        }  # fmt: skip
        if self.case.index == "device":
            arguments["prefix_len_ptr"] = self.b.array(arguments["prefix_len_ptr"].view(np.int32))
            arguments["token_pos_in_items_ptr"] = self.b.array(arguments["token_pos_in_items_ptr"].view(np.int16))
        return [], each, arguments

    # ---- results
    def call(self, run: Callable[..., Any], shape: tuple[int, ...], dtype: str, lse_shape: tuple[int, ...] | None = None) -> Callable[[], Any]:  # fmt: skip
        """`run` as the case wants its results: the output, both, or both where the caller says."""

        def execute() -> list[tuple[Any, Any]]:
            kind = self.case.results
            if kind == "out":
                return [(run(), None)]
            if kind == "both":
                return [run(return_lse=True)]
            out = self.tensor(np.full(shape, np.nan), dtype)
            lse = self.b.full(shape[:2] if lse_shape is None else lse_shape, np.nan, "float32")
            got = run(out=out, lse=lse, return_lse=True)
            assert got[0] is out and got[1] is lse, "other tensors than those given"
            return [got]

        return execute

    def expect(
        self, q: np.ndarray, qo: list[int], k: list[np.ndarray], v: list[np.ndarray], each: list[dict[str, Any]] | None = None, **options: Any
    ) -> Exact:  # fmt: skip
        """The reference of a batch: q [rows, heads, dim], one request after another."""
        ends = np.cumsum([0, *qo])
        each = [{}] * len(qo) if each is None else each
        parts = [
            attention_with_bounds(q[a:z], keys, values, **(options | own))
            for (a, z), keys, values, own in zip(itertools.pairwise(ends), k, v, each, strict=True)
        ]
        return joined(parts)


# ---- operators ------------------------------------------------------------------------------------------------------------------
def single_decode(d: Draw) -> Prepared:
    c = d.case
    q, q64 = d.queries(1)
    k, v, k64, v64 = d.dense(d.one()[1])
    arguments = {**d.encoding(), **d.scales("q_scale", "k_scale", "v_scale")}

    def run(**results: Any) -> Any:
        got = pyinfer.single_decode_with_kv_cache(
            q[0],
            k,
            v,
            kv_layout=c.layout,
            window_left=c.window,
            logits_soft_cap=c.cap,
            sm_scale=d.sm_scale,
            **arguments,
            **results,
        )
        return (got[0][None], got[1][None]) if results else got[None]

    want = d.expect(q64, [1], [k64], [v64], **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")})
    return Prepared(d.call(run, (1, c.heads, c.dims[1]), c.dtype), [Wanted(want, c.dtype)])


def single_prefill(d: Draw) -> Prepared:
    c = d.case
    qo, kv = d.one()
    q, q64 = d.queries(qo)
    k, v, k64, v64 = d.dense(kv)
    masks, each, mask = d.masks([(qo, kv)])
    if masks:
        mask = {name: d.b.array(masks[0] if name == "custom_mask" else packed(masks[0])) for name in mask}
    arguments = {**d.encoding(), **mask, **d.scales("scale_q", "scale_k", "scale_v")}

    def run(**results: Any) -> Any:
        return pyinfer.single_prefill_with_kv_cache(
            q, k, v, o_dtype=None if c.out == "same" else c.out, causal=c.causal, kv_layout=c.layout, sm_scale=d.sm_scale, window_left=c.window,
            logits_soft_cap=c.cap, backend=c.backend, **arguments, **results,
        )  # fmt: skip

    want = d.expect(q64, [qo], [k64], [v64], each, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")})
    return Prepared(d.call(run, (qo, c.heads, c.dims[1]), c.out_dtype), [Wanted(want, c.out_dtype)])


def _types(c: Case) -> dict[str, Any]:
    return {"q_data_type": c.dtype, "kv_data_type": None if c.kv == "same" else c.kv}


def _scores(d: Draw) -> dict[str, Any]:
    return {"window_left": d.case.window, "logits_soft_cap": d.case.cap, "sm_scale": d.sm_scale}


def decode(d: Draw) -> Prepared:
    c = d.case
    qo, lens = d.lengths(decode=True)
    t, (q, q64), (sinks, sinks64) = d.paged(lens), d.queries(len(lens)), d.sinks()
    w = pyinfer.BatchDecodeWithPagedKVCacheWrapper(d.workspace(), c.layout, backend=c.backend)
    w.plan(
        *(d.metadata(x) for x in (t.indptr, t.indices, t.last)), c.heads, c.kv_heads, c.dims[0], c.page, o_data_type=None if c.out == "same" else c.out,
        **_types(c), **_scores(d), **d.encoding(), **d.splits(),
    )  # fmt: skip
    arguments = {**d.scales("q_scale", "k_scale", "v_scale"), "sinks": sinks}
    want = d.expect(q64, qo, t.k, t.v, sinks=sinks64, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")})
    run = d.call(
        lambda **results: w.run(q, t.cache, **arguments, **results), (len(lens), c.heads, c.dims[1]), c.out_dtype
    )
    return Prepared(run, [Wanted(want, c.out_dtype)])


def paged(d: Draw) -> Prepared:
    c = d.case
    qo, lens = d.lengths()
    t, (q, q64), (sinks, sinks64) = d.paged(lens), d.queries(sum(qo)), d.sinks()
    _, each, mask = d.masks(list(zip(qo, lens, strict=True)))
    wrapper = (
        pyinfer.BatchAttentionWithAttentionSinkWrapper
        if c.op == "sinks"
        else pyinfer.BatchPrefillWithPagedKVCacheWrapper
    )
    w = wrapper(d.workspace(), c.layout, backend=c.backend)
    w.plan(
        *(d.metadata(x) for x in (indptr_of(qo), t.indptr, t.indices, t.last)), c.heads, c.kv_heads, c.dims[0], c.page, c.dims[1], causal=c.causal,
        o_data_type=None if c.out == "same" else c.out, **_types(c), **_scores(d), **d.encoding(), **d.splits(), **mask,
    )  # fmt: skip
    arguments = {**d.scales("q_scale", "k_scale", "v_scale"), "sinks": sinks}
    want = d.expect(q64, qo, t.k, t.v, each, sinks=sinks64, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")})
    run = d.call(
        lambda **results: w.run(q, t.cache, **arguments, **results), (sum(qo), c.heads, c.dims[1]), c.out_dtype
    )
    return Prepared(run, [Wanted(want, c.out_dtype)])


def ragged(d: Draw) -> Prepared:
    c = d.case
    qo, lens = d.lengths()
    (k, v, k64, v64), (q, q64), (sinks, sinks64) = d.dense(sum(lens)), d.queries(sum(qo)), d.sinks()
    _, each, mask = d.masks(list(zip(qo, lens, strict=True)))
    w = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(d.workspace(), c.layout, backend=c.backend)
    w.plan(
        *(d.metadata(x) for x in (indptr_of(qo), indptr_of(lens))), c.heads, c.kv_heads, *c.dims, causal=c.causal,
        o_data_type=None if c.out == "same" else c.out, **_types(c), **_scores(d), **d.encoding(), **d.splits(), **mask,
    )  # fmt: skip
    arguments = {**d.scales("q_scale", "k_scale", "v_scale"), "sinks": sinks}
    ends = np.cumsum(lens)[:-1]
    want = d.expect(
        q64, qo, np.split(k64, ends), np.split(v64, ends), each, sinks=sinks64, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")}
    )  # fmt: skip
    run = d.call(lambda **results: w.run(q, k, v, **arguments, **results), (sum(qo), c.heads, c.dims[1]), c.out_dtype)
    return Prepared(run, [Wanted(want, c.out_dtype)])


def batch_attention(d: Draw) -> Prepared:
    c = d.case
    qo, lens = d.lengths()
    t, (q, q64) = d.paged(lens), d.queries(sum(qo))
    w = pyinfer.BatchAttention(c.layout)
    w.plan(
        *(d.metadata(x) for x in (indptr_of(qo), t.indptr, t.indices, t.lens)), c.heads, c.kv_heads, *c.dims, c.page, causal=c.causal, sm_scale=d.sm_scale,
        logits_soft_cap=c.cap, q_data_type=c.dtype, kv_data_type=c.kv_dtype,
    )  # fmt: skip
    arguments = d.scales("k_scale", "v_scale")
    want = d.expect(q64, qo, t.k, t.v, **{**d.options(), **d.scaled(d.sm_scale, "k", "v")})

    def run(return_lse: bool, **results: Any) -> Any:
        return w.run(q, t.cache, **arguments, **results)

    return Prepared(d.call(run, (sum(qo), c.heads, c.dims[1]), c.dtype), [Wanted(want, c.dtype)])


def cascade(d: Draw) -> Prepared:
    """Two or three levels: all requests share one prefix, pairs of them another, each has its own keys."""
    c, rng = d.case, d.rng
    qo, own = d.lengths()
    n = len(qo)
    groups = [[list(range(n))], [[r] for r in range(n)]]
    if c.kv_heads != 2:
        groups.insert(1, [list(range(a, min(a + 2, n))) for a in range(0, n, 2)])
    shared = [[0 if d.empty else int(rng.integers(0, 80)) for _ in level] for level in groups[:-1]]
    t = d.paged([m for level in (*shared, own) for m in level])
    at, tables, first = np.cumsum([0, *(len(level) for level in groups)]), [], t.indptr
    for level, (a, z) in zip(groups, itertools.pairwise(at), strict=True):
        rows = indptr_of([sum(qo[r] for r in group) for group in level])
        tables.append((rows, first[a : z + 1] - first[a], t.indices[first[a] : first[z]], t.last[a:z]))
    w = pyinfer.MultiLevelCascadeAttentionWrapper(len(groups), d.workspace(), c.layout)
    w.plan(
        *([d.metadata(x) for x in column] for column in zip(*tables, strict=True)), c.heads, c.kv_heads, c.dims[0], c.page, causal=c.causal,
        sm_scale=d.sm_scale, logits_soft_cap=c.cap, **_types(c),
    )  # fmt: skip
    q, q64 = d.queries(sum(qo))
    chains = [
        [int(a) + next(i for i, g in enumerate(level) if r in g) for a, level in zip(at, groups, strict=False)]
        for r in range(n)
    ]
    k, v = ([np.concatenate([x[i] for i in chain]) for chain in chains] for x in (t.k, t.v))
    each = []
    for rows_, keys, mine in zip(qo, k, own, strict=True):
        mask = np.ones((rows_, len(keys)), bool)
        if c.causal:  # among a request's own keys
            mask[:, len(keys) - mine :] = np.arange(mine)[None] <= mine - rows_ + np.arange(rows_)[:, None]
        each.append({"mask": mask})
    arguments = d.scales("q_scale", "k_scale", "v_scale")
    want = d.expect(q64, qo, k, v, each, **{**d.options(), "causal": False, **d.scaled(d.sm_scale, "q", "k", "v")})
    run = d.call(lambda **results: w.run(q, t.cache, **arguments, **results), (sum(qo), c.heads, c.dims[1]), c.dtype)
    return Prepared(run, [Wanted(want, c.dtype, 2)])


def cascade_one(d: Draw) -> Prepared:
    """A single level: what depends on places is allowed too."""
    c = d.case
    qo, lens = d.lengths()
    t, (q, q64) = d.paged(lens), d.queries(sum(qo))
    w = pyinfer.MultiLevelCascadeAttentionWrapper(1, d.workspace(), c.layout)
    w.plan(
        *([d.metadata(x)] for x in (indptr_of(qo), t.indptr, t.indices, t.last)), c.heads, c.kv_heads, c.dims[0], c.page, causal=c.causal,
        **_types(c), **_scores(d), **d.encoding(),
    )  # fmt: skip
    arguments = d.scales("q_scale", "k_scale", "v_scale")
    want = d.expect(q64, qo, t.k, t.v, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")})
    run = d.call(lambda **results: w.run(q, t.cache, **arguments, **results), (sum(qo), c.heads, c.dims[1]), c.dtype)
    return Prepared(run, [Wanted(want, c.dtype)])


def pod(d: Draw) -> Prepared:
    """One request that prefills and a batch that decodes."""
    c = d.case
    ones, lens = d.lengths(decode=True)
    qo, kv = d.one()
    t, (q_d, q_d64), (q_p, q_p64) = d.paged(lens), d.queries(len(lens)), d.queries(qo)
    k, v, k64, v64 = d.dense(kv)
    masks, each, mask = d.masks([(qo, kv)])
    if masks:
        mask = {name + "_p": d.b.array(masks[0] if name == "custom_mask" else packed(masks[0])) for name in mask}
    w = pyinfer.PODWithPagedKVCacheWrapper(d.workspace(), c.layout)
    w.plan(
        *(d.metadata(x) for x in (t.indptr, t.indices, t.last)), c.heads, c.kv_heads, c.dims[0], c.page, window_left=c.window, sm_scale=d.sm_scale,
        **_types(c), **d.encoding(),
    )  # fmt: skip
    encoding = {name + "_p": x for name, x in d.encoding().items()}
    lse = c.results == "both"

    def run() -> list[tuple[Any, Any]]:
        got = w.run(
            q_p, k, v, q_d, t.cache, causal_p=c.causal, kv_layout_p=c.layout, sm_scale_p=d.sm_scale, window_left_p=c.window, return_lse_p=lse,
            return_lse_d=lse, **encoding, **mask, **d.scales("q_scale", "k_scale", "v_scale"),
        )  # fmt: skip
        return list(got) if lse else [(x, None) for x in got]

    options = d.options()
    prefill = d.expect(q_p64, [qo], [k64], [v64], each, **{**options, **d.scaled(d.sm_scale)}, )  # fmt: skip
    both = d.expect(q_d64, ones, t.k, t.v, **{**options, **d.scaled(d.sm_scale, "q", "k", "v"), "causal": False})
    return Prepared(run, [Wanted(prefill, c.dtype), Wanted(both, c.dtype)])


def batch_pod(d: Draw) -> Prepared:
    """Two batches, each with its own cache: one prefills, one decodes."""
    c = d.case
    qo_p, lens_p = d.lengths()
    qo_d, lens_d = d.lengths(decode=True)
    (t_p, t_d), (q_p, q_p64), (q_d, q_d64) = (
        (d.paged(lens_p), d.paged(lens_d)),
        d.queries(sum(qo_p)),
        d.queries(sum(qo_d)),
    )
    _, each, mask = d.masks(list(zip(qo_p, lens_p, strict=True)))
    w = pyinfer.BatchPODWithPagedKVCacheWrapper(d.workspace(), c.layout)
    tables = [(indptr_of(qo), t.indptr, t.indices, t.last) for qo, t in ((qo_p, t_p), (qo_d, t_d))]
    w.plan(
        *(d.metadata(x) for table in tables for x in table), c.heads, c.kv_heads, c.dims[0], c.page, window_left=c.window, sm_scale=d.sm_scale,
        **_types(c), **d.encoding(),
    )  # fmt: skip
    mask = {name + "_p": x for name, x in mask.items()}
    scales = d.scales("q_scale", "k_scale", "v_scale")
    lse = c.results == "both"

    def run() -> list[tuple[Any, Any]]:
        got = w.run(q_p, t_p.cache, q_d, t_d.cache, causal_p=c.causal, return_lse=lse, **mask, **scales)
        return list(zip(*got, strict=True)) if lse else [(x, None) for x in got]

    options = d.options()
    prefill = d.expect(q_p64, qo_p, t_p.k, t_p.v, each, **{**options, **d.scaled(d.sm_scale)})
    both = d.expect(q_d64, qo_d, t_d.k, t_d.v, **{**options, **d.scaled(d.sm_scale, "q", "k", "v"), "causal": False})
    return Prepared(run, [Wanted(prefill, c.dtype), Wanted(both, c.dtype)])


def block_sparse(d: Draw) -> Prepared:
    c, rng = d.case, d.rng
    r = {"mixed": 40, "decode": 1, "long": 34, "shared": 36}[c.shape]
    r = min(r, 5) if c.group > 16 else r
    mb, nb = 3, 9 if c.page < 64 else 3 if c.page < 257 else 2
    if c.shape == "long":
        nb = -(-400 // c.page)
    counts = rng.integers(1, nb + 1, mb)
    counts[1] = 0  # a block row without blocks
    if d.empty:
        counts[:] = 0
    columns = [rng.permutation(nb)[:n] if c.shape != "shared" else rng.integers(0, nb, n) for n in counts]
    indices, indptr = np.concatenate(columns).astype(np.int32), indptr_of(counts)
    q, q64 = d.queries(mb * r)
    k, v, k64, v64 = d.dense(nb * c.page)
    every = [(np.asarray(x)[:, None] * c.page + np.arange(c.page)).reshape(-1) for x in columns]
    each: list[dict[str, Any]] = [{} for _ in columns]
    arguments: dict[str, Any] = {}
    if c.mask != "none":
        mask = rng.random((len(indices), r, c.page)) < 0.6
        by_row = [mask[a:z].swapaxes(0, 1).reshape(r, -1) for a, z in itertools.pairwise(indptr)]
        each = [{"mask": m} for m in by_row]
        if c.mask == "bool":
            arguments["mask"] = d.b.array(mask)
        else:
            bits = [packed(m) for m in by_row]
            arguments["packed_mask"] = d.b.array(np.concatenate(bits))
    w = pyinfer.BlockSparseAttentionWrapper(d.workspace(), c.backend)
    w.plan(
        d.metadata(indptr), d.metadata(indices), mb * r, nb * c.page, r, c.page, c.heads, c.kv_heads, c.dims[0], causal=c.causal, sm_scale=d.sm_scale,
        logits_soft_cap=c.cap, o_data_type=None if c.out == "same" else c.out, **_types(c), **d.encoding(), **arguments,
    )  # fmt: skip
    scales = d.scales("scale_q", "scale_k", "scale_v")
    want = d.expect(
        q64, [r] * mb, [k64[x] for x in every], [v64[x] for x in every], each, **{**d.options(), **d.scaled(d.sm_scale, "q", "k", "v")}
    )  # fmt: skip
    run = d.call(lambda **results: w.run(q, k, v, **scales, **results), (mb * r, c.heads, c.dims[1]), c.out_dtype)
    return Prepared(run, [Wanted(want, c.out_dtype)])


def variable_sparse(d: Draw) -> Prepared:
    """Places, and so ALiBi's slopes, count within a kv head's group: each kv head is a matrix of its own."""
    c, rng = d.case, d.rng
    unit = {"mixed": 1, "decode": 4, "long": 16}[c.shape]
    rows, keys = {"mixed": (41, 90), "decode": (3, 96), "long": (34, 480)}[c.shape]
    mb, nb = 3, 5

    def sizes(n: int, total: int, step: int) -> np.ndarray:
        cuts = np.sort(rng.integers(0, total // step + 1, (c.kv_heads, n - 1)), 1) * step
        ends = np.concatenate([np.zeros((c.kv_heads, 1), int), cuts, np.full((c.kv_heads, 1), total)], 1)
        return np.diff(ends, axis=1)

    row_sz, col_sz = sizes(mb, rows, 1), sizes(nb, keys, unit)
    seen = rng.random((c.kv_heads, mb, nb)) < (0 if d.empty else 0.6)
    seen[0, 0] = False
    values = d.normal((c.heads, rows, c.dims[0]), d.q_size)
    q, q64 = d.tensor(values, c.dtype), rounded(values, c.dtype)
    k = d.normal((c.kv_heads, keys, c.dims[0]), d.k_size)
    v = d.normal((c.kv_heads, keys, c.dims[1]))
    k64, v64 = rounded(k, c.kv_dtype), rounded(v, c.kv_dtype)
    k, v = d.tensor(k, c.kv_dtype), d.tensor(v, c.kv_dtype)
    w = pyinfer.VariableBlockSparseAttentionWrapper(d.workspace(), c.backend)
    tables = [seen, row_sz, col_sz]
    if c.index == "device":
        tables = [d.b.array(x) for x in tables]
    elif c.index == "int32":
        tables = [seen, row_sz.astype(np.int32), col_sz.astype(np.int32)]
    w.plan(
        *tables, c.heads, c.kv_heads, c.dims[0], causal=c.causal, sm_scale=d.sm_scale, logits_soft_cap=c.cap, **_types(c), **d.encoding(),
    )  # fmt: skip
    by_head = []
    for h in range(c.kv_heads):
        part = q64[h * c.group : (h + 1) * c.group].swapaxes(0, 1)
        at = [np.repeat(seen[h, i], col_sz[h]) for i in range(mb)]
        options = {**d.options(), **d.scaled(d.sm_scale)}
        by_head.append(d.expect(part, row_sz[h].tolist(), [k64[h][x][:, None] for x in at], [v64[h][x][:, None] for x in at], **options))  # fmt: skip
    want = Exact(*(np.concatenate([x.swapaxes(0, 1) for x in field]) for field in zip(*by_head, strict=True)))
    run = d.call(lambda **results: w.run(q, k, v, **results), (c.heads, rows, c.dims[1]), c.dtype)
    return Prepared(run, [Wanted(want, c.dtype)])


def _latent(d: Draw, decode_only: bool) -> tuple[Any, ...]:
    """MLA is attention with one kv head: keys are latent and rotary parts together, values the latent part."""
    c = d.case
    qo, lens = d.lengths(decode=decode_only)
    latent, rotary = c.dims[1], c.dims[0] - c.dims[1]
    plain = c._replace(dims=(c.dims[0], 1), kv_heads=1, layout="NHD", form="plain")
    inner = Draw(plain, d.rng, d.device, empty=d.empty)
    inner.b, inner.k_size = d.b, d.k_size
    t = inner.paged(lens)
    rows = d.normal((sum(qo), c.heads, c.dims[0]), d.q_size)
    q64 = rounded(rows, c.dtype)
    cache = t.cache[0].reshape(t.cache[0].shape[0], c.page, c.dims[0])
    q = d.b.array(rows, c.dtype)
    parts = [q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:]]
    if c.form == "plain":  # each a tensor of its own
        parts = [x.contiguous() if d.b.framework == "torch" else x.copy() for x in parts]
    assert parts[1].shape[-1] == rotary
    return qo, t, parts, q64, [x[:, :, :latent] for x in t.k]


def mla(d: Draw) -> Prepared:
    c = d.case
    qo, t, (nope, pe, ckv, kpe), q64, values = _latent(d, False)
    w = pyinfer.mla.BatchMLAPagedAttentionWrapper(d.workspace(), backend=c.backend)
    tables = [d.metadata(x) for x in (indptr_of(qo), t.indptr, t.indices, t.lens)]
    w.plan(*tables, c.heads, c.dims[1], c.dims[0] - c.dims[1], c.page, c.causal, MLA_SCALE, c.dtype, c.kv_dtype)
    want = d.expect(q64, qo, t.k, values, **{**d.options(), "sm_scale": MLA_SCALE})
    run = d.call(lambda **results: w.run(nope, pe, ckv, kpe, **results), (sum(qo), c.heads, c.dims[1]), c.dtype)
    return Prepared(run, [Wanted(want, c.dtype)])


def mla_decode(d: Draw) -> Prepared:
    c = d.case
    qo, t, (nope, pe, ckv, kpe), q64, values = _latent(d, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        w = pyinfer.mla.BatchDecodeMlaWithPagedKVCacheWrapper(d.workspace(), use_tensor_cores=True)
    tables = [d.metadata(x) for x in (t.indptr, t.indices, t.last)]
    w.plan(
        *tables, c.heads, c.dims[1], c.page, MLA_SCALE, window_left=c.window, logits_soft_cap=c.cap, data_type=c.dtype
    )
    scales = d.scales("q_scale", "k_scale")
    want = d.expect(q64, qo, t.k, values, **{**d.options(), **d.scaled(MLA_SCALE, "q", "k")})
    run = d.call(
        lambda **results: w.run(nope, pe, ckv, kpe, **scales, **results), (sum(qo), c.heads, c.dims[1]), c.dtype
    )
    return Prepared(run, [Wanted(want, c.dtype)])


def _prefix(d: Draw, decode_only: bool) -> Prepared:
    c = d.case
    qo, lens = d.lengths(decode=decode_only)
    t, (q, q64) = d.paged(lens), d.queries(sum(qo))
    k, v, k64, v64 = d.dense(0 if d.empty else 70)
    name = (
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper"
        if decode_only
        else "BatchPrefillWithSharedPrefixPagedKVCacheWrapper"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        w = getattr(pyinfer, name)(d.workspace(), c.layout)
    tables = [d.metadata(x) for x in (t.indptr, t.indices, t.last)]
    shape = (c.heads, c.kv_heads, c.dims[0], c.page, c.dtype)
    w.begin_forward(*([] if decode_only else [d.metadata(indptr_of(qo))]), *tables, *shape)
    causal = {} if decode_only else {"causal": c.causal}
    each = []
    for rows, own in zip(qo, lens, strict=True):
        mask = np.ones((rows, len(k64) + own), bool)
        if c.causal and not decode_only:
            mask[:, len(k64) :] = np.arange(own)[None] <= own - rows + np.arange(rows)[:, None]
        each.append({"mask": mask})
    keys, values = ([np.concatenate([shared, x]) for x in own] for shared, own in ((k64, t.k), (v64, t.v)))
    want = d.expect(q64, qo, keys, values, each, **{**d.options(), **d.scaled(d.sm_scale), "causal": False})
    return Prepared(
        lambda: [(w.forward(q, k, v, t.cache, sm_scale=d.sm_scale, **causal), None)], [Wanted(want, c.dtype, 2)]
    )


def prefix_decode(d: Draw) -> Prepared:
    return _prefix(d, True)


def prefix_prefill(d: Draw) -> Prepared:
    return _prefix(d, False)


RUNNERS: dict[str, Callable[[Draw], Prepared]] = {
    f.__name__: f
    for f in (
        single_decode, single_prefill, decode, paged, ragged, batch_attention, cascade, cascade_one, pod, batch_pod, block_sparse, variable_sparse, mla,
        mla_decode, prefix_decode, prefix_prefill,
    )
} | {"sinks": paged}  # fmt: skip


# ---- the comparison -------------------------------------------------------------------------------------------------------------
def check(d: Draw, wanted: Wanted, out: Any, lse: Any, name: str) -> float:
    """Fail unless a result is within the rounding that its types bring; returns the share of rows about which the reference decides."""
    c, exact = d.case, wanted.exact
    got = d.b.float64(out)
    assert d.b.is_own(out) and got.shape == exact.out.shape, (
        f"{name}: {type(out)} {got.shape}, expected {exact.out.shape}"
    )
    assert d.b.numpy(out).dtype == (NUMPY_DTYPES.get(wanted.dtype) or np.dtype(wanted.dtype)), (
        f"{name}: {d.b.numpy(out).dtype}"
    )
    unseen = np.isneginf(exact.lse)
    assert np.isfinite(got).all(), f"{name}: not finite at {np.argwhere(~np.isfinite(got))[:4].tolist()}"
    assert (got[unseen] == 0).all(), f"{name}: a row without keys is not zero"
    own = EPSILON[c.dtype]
    weights = exact.weight_error + (2 * own if d.device == "cuda" else 0) + wanted.roundings * own + 4e-6
    decided = np.isfinite(weights)
    bound = (
        1.02 * EPSILON[wanted.dtype] * np.abs(exact.out) + np.where(decided, weights, 0)[..., None] * exact.mean + 2e-6
    )
    excess = np.where(decided[..., None], np.abs(got - exact.out) - bound, -1)
    if (excess > 0).any():
        at = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {got.size} values off; worst at {at}: got {got[at]!r}, expected {exact.out[at]!r}, allowed {bound[at]:.3e}"
        )
    if lse is not None:
        found = d.b.float64(lse)
        assert found.shape == exact.lse.shape and d.b.numpy(lse).dtype == np.float32, f"{name}: lse {found.shape}"
        assert (np.isneginf(found) == unseen).all(), f"{name}: -inf in the lse elsewhere than expected"
        seen = ~unseen
        room = (
            exact.score_error[seen] / math.log(2)
            + 4e-6 * np.abs(exact.lse[seen])
            + (1e-3 if d.device == "cuda" else 3e-5)
        )
        off = np.abs(found[seen] - exact.lse[seen]) - room
        worst = int(off.argmax()) if off.size else 0
        assert (off <= 0).all(), (
            f"{name}: lse off by {off.max():.3e} too much: got {found[seen][worst]}, expected {exact.lse[seen][worst]}"
        )
    return float(decided.mean()) if decided.size else 1.0
