"""The grid of attention: what an operator takes, as factors and their values; the rows that cover every pair of them; the numbers behind a row.

A factor that an operator does not have stays at its value `OFF`. Head dimensions, group sizes and page sizes stand in classes, whose members take turns from
row to row.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

from tests.covering import Row, covering_array

FULL = os.environ.get("PYINFER_FULL_GRID") == "1"
"""Run the whole grid on the CPU too, where each combination of options is a kernel that Numba compiles for two seconds or more."""

DIMS: dict[str, tuple[tuple[int, int], ...]] = {
    "64": ((64, 64),),
    "128": ((128, 128),),
    "256": ((256, 256),),
    "low": tuple((d, d) for d in range(8, 64, 8)),
    "mid": tuple((d, d) for d in range(72, 128, 8)),
    "high": tuple((d, d) for d in range(136, 256, 8)),
    "192/128": ((192, 128),),
    "uneven": ((72, 40), (8, 256), (256, 8), (64, 32), (136, 248), (40, 104), (96, 160), (248, 136), (16, 56), (128, 24), (200, 72)),
    "odd": ((100, 100), (34, 34), (2, 2), (250, 250), (6, 6), (130, 130)),
    "mla": ((576, 512),),
}  # fmt: skip
GROUPS: dict[str, tuple[int, ...]] = {
    "1": (1,),
    "few": (2, 8, 4, 3, 7, 5, 6),
    "some": (16, 9, 12, 11, 15, 10, 14, 13),
    "many": (32, 17, 64, 20, 33, 63, 24, 48),
    "most": (128, 65, 96, 127, 100, 66, 112, 81),
}
PAGES: dict[str, tuple[int, ...]] = {
    "none": (0,),
    "1": (1,),
    "few": (2, 5, 8, 3, 12, 15, 4, 7),
    "16": (16,),
    "some": (32, 17, 48, 63, 24, 33),
    "64": (64,),
    "many": (128, 65, 256, 100, 255, 96, 192),
    "more": (257, 1000, 512, 300),
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "op": (
        "single_decode", "single_prefill", "decode", "paged", "ragged", "batch_attention", "cascade", "cascade_one", "pod", "block_sparse",
        "variable_sparse", "mla", "mla_decode", "prefix_decode", "prefix_prefill", "batch_pod", "sinks",
    ),
    "dtype": ("float16", "bfloat16", "float32"),
    "kv": ("same", "float8_e4m3fn", "float8_e5m2"),
    "out": ("same", "float16", "bfloat16", "float32"),
    "dims": tuple(DIMS),
    "group": tuple(GROUPS),
    "page": tuple(PAGES),
    "layout": ("NHD", "HND"),
    "form": ("plain", "combined", "strided", "unaligned"),
    "causal": (False, True),
    "mask": ("none", "bool", "packed", "items"),
    "window": (-1, 0, 7, 100),
    "cap": (0.0, 4.0),
    "scale": ("default", "given"),
    "pos": ("NONE", "ALIBI", "ROPE_LLAMA"),
    "sinks": (False, True),
    "scales": ("none", "numbers", "tensors"),
    "split": ("auto", "never", "fixed"),
    "index": ("int32", "int64", "list", "device"),
    "results": ("out", "both", "given"),
    "shape": ("mixed", "decode", "short", "long", "shared"),
    "framework": ("torch", "native"),
    "workspace": ("own", "given"),
    "backend": ("auto", "fa2", "fa3"),
}  # fmt: skip
OFF: dict[str, Any] = {
    "kv": "same", "out": "same", "page": "none", "layout": "NHD", "form": "plain", "causal": False, "mask": "none", "window": -1, "cap": 0.0,
    "scale": "default", "pos": "NONE", "sinks": False, "scales": "none", "split": "auto", "index": "int32", "results": "out", "workspace": "own",
    "backend": "auto",
}  # fmt: skip

_ALL_PAGES = tuple(p for p in PAGES if p != "none")
_EQUAL = ("64", "128", "256", "low", "mid", "high", "odd")
_ANY = (*_EQUAL, "192/128", "uneven")
_DENSE = {"form": ("plain", "strided", "unaligned"), "shape": ("mixed", "decode", "short", "long")}
_ALWAYS = ("dtype", "group", "shape", "framework")  # every operator has these


def _op(*factors: str, **some: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The values an operator takes: all of the factors named, those given of others, and what is off of the rest."""
    found: dict[str, tuple[Any, ...]] = {f: FACTORS[f] for f in (*_ALWAYS, *factors)} | some
    return {f: found.get(f, (OFF[f],) if f in OFF else FACTORS[f]) for f in FACTORS if f != "op"}


_PAGED = dict(page=_ALL_PAGES, dims=_EQUAL)
OPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "single_decode": _op("kv", "layout", "window", "cap", "scale", "pos", "scales", dims=_ANY, results=("out", "both"), **_DENSE),
    "single_prefill": _op(
        "kv", "out", "layout", "causal", "window", "cap", "scale", "pos", "scales", "backend",
        dims=_ANY, mask=("none", "bool", "packed"), results=("out", "both"), **_DENSE,
    ),
    "decode": _op(
        "kv", "out", "layout", "form", "window", "cap", "scale", "pos", "sinks", "scales", "split", "index", "results", "workspace",
        backend=("auto", "fa2"), **_PAGED,
    ),
    "paged": _op(
        "kv", "out", "layout", "form", "causal", "mask", "window", "cap", "scale", "pos", "sinks", "scales", "split", "index", "results", "workspace",
        "backend", dims=_ANY, page=_ALL_PAGES,
    ),
    "sinks": _op(
        "kv", "out", "layout", "form", "causal", "mask", "window", "cap", "scale", "pos", "scales", "split", "index", "results", "workspace", "backend",
        dims=_ANY, page=_ALL_PAGES, sinks=(True,),
    ),
    "ragged": _op(
        "kv", "out", "layout", "causal", "mask", "window", "cap", "scale", "pos", "sinks", "scales", "split", "index", "results", "workspace",
        "backend", dims=_ANY, **_DENSE,
    ),
    "batch_attention": _op("kv", "layout", "form", "causal", "cap", "scale", "scales", "index", results=("both", "given"), **_PAGED),
    "cascade": _op("kv", "layout", "form", "causal", "cap", "scale", "scales", "index", "results", "workspace", **_PAGED),
    "cascade_one": _op("kv", "layout", "form", "causal", "window", "cap", "scale", "pos", "scales", "index", "results", "workspace", **_PAGED),
    "pod": _op(
        "kv", "layout", "form", "causal", "window", "scale", "pos", "scales", "index", "workspace",
        mask=("none", "bool", "packed"), results=("out", "both"), **_PAGED,
    ),
    "batch_pod": _op(
        "kv", "layout", "form", "causal", "window", "scale", "pos", "scales", "index", "workspace",
        mask=("none", "bool", "packed"), results=("out", "both"), **_PAGED,
    ),
    "block_sparse": _op(
        "kv", "out", "causal", "cap", "scale", "pos", "scales", "index", "results", "workspace", "backend",
        mask=("none", "bool", "packed"), form=("plain", "strided", "unaligned"), shape=("mixed", "decode", "long", "shared"), **_PAGED,
    ),
    "variable_sparse": _op(
        "kv", "causal", "cap", "scale", "pos", "results", "workspace", "backend",
        dims=_EQUAL, index=("int32", "int64", "device"), form=("plain", "strided", "unaligned"), shape=("mixed", "decode", "long"),
    ),
    "mla": _op("kv", "causal", "index", "results", "workspace", "backend", dims=("mla",), page=_ALL_PAGES, scale=("given",), form=("plain", "strided")),
    "mla_decode": _op(
        "window", "cap", "scales", "index", "results", "workspace", dims=("mla",), page=_ALL_PAGES, scale=("given",), form=("plain", "strided")
    ),
    "prefix_decode": _op("layout", "scale", "index", "workspace", form=("plain", "combined", "strided"), **_PAGED),
    "prefix_prefill": _op("layout", "causal", "scale", "index", "workspace", form=("plain", "combined", "strided"), **_PAGED),
}  # fmt: skip

NAMES = {  # of the public functions and wrappers
    "single_decode": "single_decode_with_kv_cache",
    "single_prefill": "single_prefill_with_kv_cache",
    "decode": "BatchDecodeWithPagedKVCacheWrapper",
    "paged": "BatchPrefillWithPagedKVCacheWrapper",
    "ragged": "BatchPrefillWithRaggedKVCacheWrapper",
    "batch_attention": "BatchAttention",
    "cascade": "MultiLevelCascadeAttentionWrapper",
    "cascade_one": "MultiLevelCascadeAttentionWrapper",
    "pod": "PODWithPagedKVCacheWrapper",
    "batch_pod": "BatchPODWithPagedKVCacheWrapper",
    "sinks": "BatchAttentionWithAttentionSinkWrapper",
    "block_sparse": "BlockSparseAttentionWrapper",
    "variable_sparse": "VariableBlockSparseAttentionWrapper",
    "mla": "BatchMLAPagedAttentionWrapper",
    "mla_decode": "BatchDecodeMlaWithPagedKVCacheWrapper",
    "prefix_decode": "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "prefix_prefill": "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
}

_EXCLUDED = (
    # A request of one row sees its last key, or is the last of a causal mask: nothing is left to see of what these say.
    (("shape", "decode"), ("mask", "items")),
    # One tensor holds keys and values of one size.
    (("form", "combined"), ("dims", "192/128")),
    (("form", "combined"), ("dims", "uneven")),
)


def allowed(factor: str, value: Any, other: str, its: Any) -> bool:
    """Whether two values may stand in one row of the grid."""
    if factor == "op":
        return its in OPS[value][other]
    pair = {(factor, value), (other, its)}
    return not any(set(excluded) == pair for excluded in _EXCLUDED)


def on_device(device: str) -> dict[str, tuple[Any, ...]]:
    """The factors with the values that exist on a device."""
    if device == "cpu":
        return FACTORS
    return FACTORS | {"dtype": ("float16", "bfloat16"), "dims": tuple(d for d in FACTORS["dims"] if d != "odd")}


# ---- the cut for the CPU ---------------------------------------------------------------------------------------------------------
ARRAYS = 2
"""Covering arrays that make the full grid: pairs meet in other company too."""
KERNEL = ("dtype", "kv", "out", "pos", "mask", "sinks")
"""What makes a kernel of its own on the CPU, beside the phase."""
KERNELS = (
    ("float32", "same", "same", "NONE", "none", False),
    ("float16", "float8_e4m3fn", "same", "NONE", "none", False),
    ("bfloat16", "same", "same", "ROPE_LLAMA", "none", False),
    ("float16", "same", "same", "ALIBI", "none", True),
    ("float16", "same", "same", "ALIBI", "bool", False),
    ("float16", "same", "same", "ALIBI", "packed", False),
    ("bfloat16", "float8_e5m2", "float32", "NONE", "packed", True),
    ("float16", "same", "same", "NONE", "items", True),
)


def _allowed_kernel(factor: str, value: Any, other: str, its: Any) -> bool:
    for f, v, g, w in ((factor, value, other, its), (other, its, factor, value)):
        if f == "kernel":
            if g == "op":
                return all(x in OPS[w][name] for name, x in zip(KERNEL, v, strict=True))
            if v[4] != "none" and (g, w) == ("shape", "decode"):
                return False  # few rows: the phase of the decode kernel, compiled once more
            return all(allowed(name, x, g, w) for name, x in zip(KERNEL, v, strict=True))
    return allowed(factor, value, other, its)


@functools.cache
def rows(device: str, full: bool) -> tuple[Row, ...]:
    """The rows of the grid: every pair of values that some operator takes together; not full: with `KERNELS` in place of all combinations of those factors."""
    factors = on_device(device)
    if full:
        return tuple(row for seed in range(ARRAYS) for row in covering_array(factors, allowed, seed=seed))
    cut = {f: v for f, v in factors.items() if f not in KERNEL} | {"kernel": KERNELS}
    found = covering_array(cut, _allowed_kernel)
    return tuple(row | dict(zip(KERNEL, row["kernel"], strict=True)) for row in found)


# ---- the numbers behind a row ----------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """A row of the grid with members of its classes."""

    op: str
    dtype: str
    kv: str
    out: str
    dims: tuple[int, int]
    group: int
    kv_heads: int
    page: int
    layout: str
    form: str
    causal: bool
    mask: str
    window: int
    cap: float
    scale: str
    pos: str
    sinks: bool
    scales: str
    split: str
    index: str
    results: str
    shape: str
    framework: str
    workspace: str
    backend: str

    @property
    def kv_dtype(self) -> str:
        """Of keys and values."""
        return self.dtype if self.kv == "same" else self.kv

    @property
    def out_dtype(self) -> str:
        """Of the result."""
        return self.dtype if self.out == "same" else self.out

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.group * self.kv_heads

    def __str__(self) -> str:
        on = [f"{f}={getattr(self, f)}" for f in OFF if f in self._fields and getattr(self, f) not in (OFF[f], 0)]
        return f"{self.op}-{self.dtype}-d{self.dims[0]}x{self.dims[1]}-g{self.group}x{self.kv_heads}-{self.shape}-{self.framework}-{'-'.join(on)}"


def case_of(row: Row, turn: dict[str, int]) -> Case:
    """The row with the next members of its classes; `turn` counts how often each class came."""

    def member(kind: str, name: str, members: tuple[Any, ...]) -> Any:
        at = turn[kind + name] = turn.get(kind + name, -1) + 1
        return members[at % len(members)]

    group = member("group", row["group"], GROUPS[row["group"]])
    most = 3 if group <= 8 else 2 if group <= 16 else 1
    numbers = {
        "dims": member("dims", row["dims"], DIMS[row["dims"]]),
        "group": group,
        "kv_heads": 1 if row["dims"] == "mla" else member("heads", str(most), tuple(range(most, 0, -1))),
        "page": member("page", row["page"], PAGES[row["page"]]),
    }
    return Case(**{f: numbers.get(f, row.get(f)) for f in Case._fields})


@functools.cache
def cases(device: str, full: bool) -> tuple[Case, ...]:
    """The cases of the grid. On a GPU it is always the full one."""
    turn: dict[str, int] = {}
    return tuple(case_of(row, turn) for row in rows(device, full or device == "cuda"))
