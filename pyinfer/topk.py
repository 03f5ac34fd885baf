"""The k largest elements of rows, and what sparse attention makes of their indices.

Always exact and deterministic: the same elements in the same order in every run, on either backend. Without `sorted`, elements come in the order of
their indices. NaN counts as the largest value, as in torch.topk; of equal values at the boundary those of lowest index are taken, or of highest
(`TopKTieBreak.LARGE`).
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32, INT64
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    fail,
)
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, view
from pyinfer.torch_ops import attach

__all__ = [
    "TopKTieBreak",
    "top_k",
    "top_k_page_table_transform",
    "top_k_ragged_transform",
    "top_k_varlen",
]

_FLOATS = (FLOAT32, BFLOAT16, FLOAT16)
MAX_LEN = 1 << 28


class TopKTieBreak(IntEnum):
    """Which of equal values at the boundary are taken: those of lowest index (NONE is SMALL here: results are always repeatable), or of highest."""

    NONE = 0
    SMALL = 1
    LARGE = 2


def top_k(
    input: Any, k: int, sorted: bool = False, deterministic: bool = False, tie_break: int = TopKTieBreak.NONE
) -> tuple[Any, Any]:
    """The k largest elements of every row.

    Parameters
    ----------
    input
        [rows, n], float32, bfloat16 or float16; any row stride, last axis contiguous; n up to 2^28.
    k
        1 to n.
    sorted
        By value, the largest first (equal ones by index); otherwise by index.
    deterministic
        Accepted for compatibility: results always are.
    tie_break
        A `TopKTieBreak`.

    Returns
    -------
    values, indices
        [rows, k] in input's dtype, and int64.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or values that do not fit.
    """
    op = "top_k"
    v, large = _matrix(op, "input", input), _ties(op, tie_break)
    k = _count(op, "k", k, v.shape[1])
    in_kernel = bool(sorted) and k <= _most_sorted()
    values, indices = empty(v, (v.shape[0], k)), empty(v, (v.shape[0], k), INT64)
    _select(v, k, large, bool(sorted) if v.device < 0 else in_kernel, indices=view(indices), values=view(values))
    if sorted and not in_kernel and v.device >= 0 and v.shape[0]:
        return _sorted_by_framework(op, v, values, indices, large)
    return values, indices


def top_k_page_table_transform(
    input: Any,
    src_page_table: Any,
    lengths: Any,
    k: int,
    row_to_batch: Any = None,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
) -> Any:
    """Entries of a page table at the k largest scores of every row, in one launch: what sparse attention reads.

    Parameters
    ----------
    input
        Scores, as in `top_k`.
    src_page_table
        int32 [batch, n or more], last axis contiguous.
    lengths
        int32 [rows]: how many scores of a row count.
    k
        1 or more. A row shorter than k gives all its entries, then -1.
    row_to_batch
        int32 [rows]: the line of the page table for each row; None: the row's own number.
    deterministic, tie_break
        As in `top_k`.

    Returns
    -------
    int32 [rows, k]
        ``src_page_table[row_to_batch[i], index]``, by index.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit; on the CPU also for a row_to_batch out of range.
    """
    op = "top_k_page_table_transform"
    v, large = _matrix(op, "input", input), _ties(op, tie_break)
    k = _count(op, "k", k, None)
    rows, n = v.shape
    table = view(src_page_table, op, "src_page_table")
    check_dtype(op, "src_page_table", table, (INT32,))
    check_ndim(op, "src_page_table", table, 2)
    check_last_dim_contiguous(op, "src_page_table", table)
    check_same_device(op, {"input": v, "src_page_table": table})
    if table.shape[1] < n:
        fail(op, "src_page_table", "is too narrow", table.shape[1], f"{n} columns or more (input has so many)")
    length = _int32(op, "lengths", lengths, rows, v)
    batch = None
    if row_to_batch is not None:
        batch = _int32(op, "row_to_batch", row_to_batch, rows, v)
        if v.device < 0 and rows:
            at = as_numpy(batch)
            if at.min() < 0 or at.max() >= table.shape[0]:
                got = f"values from {at.min()} to {at.max()}"
                fail(op, "row_to_batch", "names no line of the page table", got, f"0 to {table.shape[0] - 1}")
    elif table.shape[0] < rows:
        fail(
            op,
            "src_page_table",
            "has too few lines",
            table.shape[0],
            f"{rows} or more (input's rows)",
            "Pass row_to_batch.",
        )
    out = empty(v, (rows, k), INT32)
    _select(v, k, large, False, indices=view(out), lengths=length, table=table, row_to_batch=batch)
    return out


def top_k_ragged_transform(
    input: Any, offsets: Any, lengths: Any, k: int, deterministic: bool = False, tie_break: int = TopKTieBreak.NONE
) -> Any:
    """Indices of the k largest scores of every row, plus an offset of each row, in one launch: places in a ragged tensor of keys.

    Parameters
    ----------
    input, lengths, k, deterministic, tie_break
        As in `top_k_page_table_transform`.
    offsets
        int32 [rows].

    Returns
    -------
    int32 [rows, k]
        ``index + offsets[i]``, by index; -1 behind a row shorter than k.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    """
    op = "top_k_ragged_transform"
    v, large = _matrix(op, "input", input), _ties(op, tie_break)
    k = _count(op, "k", k, None)
    rows = v.shape[0]
    length, shift = _int32(op, "lengths", lengths, rows, v), _int32(op, "offsets", offsets, rows, v)
    out = empty(v, (rows, k), INT32)
    _select(v, k, large, False, indices=view(out), lengths=length, offsets=shift)
    return out


def top_k_varlen(
    logits: Any,
    seq_lens: Any,
    top_k: int,
    pre_idx: Any = None,
    compress_ratio: int = 1,
    next_n: int = 1,
    return_values: bool = False,
    out_indices: Any = None,
    out_values: Any = None,
    backend: str = "auto",
    load_balance: bool = True,
    workspace: Any = None,
    approx_ties: bool = False,
) -> tuple[Any, Any]:
    """Indices of the k largest scores of every row, rows of requests of different lengths.

    Row r belongs to request r // next_n. Of it count the first ``(seq_lens[r // next_n] - next_n + r % next_n + 1) // compress_ratio`` scores: the last
    of a request's next_n rows sees all, the one before it one token less.

    Parameters
    ----------
    logits
        Scores, as `top_k`'s input.
    seq_lens
        int32 [rows / next_n].
    top_k
        1 or more.
    compress_ratio, next_n
        1 or more.
    return_values
        Also return the scores.
    out_indices, out_values
        Where to write: int32 [rows, top_k], and logits' dtype; contiguous. Allocated if None.
    pre_idx, backend, load_balance, workspace, approx_ties
        FlashInfer's hints to its kernels, none of which changes an exact result; this kernel needs none. `backend` must be "auto" or "radix".

    Returns
    -------
    indices, values
        int32 [rows, top_k], by index, -1 behind a row shorter than top_k; the scores (-inf there), or None.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes, devices or values that do not fit.
    """
    op = "top_k_varlen"
    v = _matrix(op, "logits", logits)
    if backend not in ("auto", "radix"):
        fail(op, "backend", "is not available", repr(backend), "'auto' or 'radix'")
    k = _count(op, "top_k", top_k, None)
    next_n, compress_ratio = _count(op, "next_n", next_n, None), _count(op, "compress_ratio", compress_ratio, None)
    rows = v.shape[0]
    if rows % next_n:
        fail(op, "next_n", "does not divide the rows", next_n, f"a divisor of {rows}")
    length = _int32(op, "seq_lens", seq_lens, rows // next_n, v)
    if out_indices is None:
        out_indices = empty(v, (rows, k), INT32)
    if out_values is None and return_values:
        out_values = empty(v, (rows, k))
    outputs = {"out_indices": view(out_indices, op, "out_indices")}
    check_dtype(op, "out_indices", outputs["out_indices"], (INT32,))
    if return_values:
        outputs["out_values"] = view(out_values, op, "out_values")
        check_same_dtype(op, "out_values", outputs["out_values"], "logits", v)
    for arg, o in outputs.items():
        check_shape(op, arg, o, (rows, k))
        if not o.is_contiguous():
            fail(op, arg, "is not contiguous", f"strides {tuple(o.strides)}", "a contiguous tensor")
        check_same_device(op, {"logits": v, arg: o})
    _select(
        v, k, False, False, indices=outputs["out_indices"], values=outputs.get("out_values"), lengths=length, next_n=next_n,
        compress_ratio=compress_ratio,
    )  # fmt: skip
    return out_indices, out_values if return_values else None


# ---- checks ------------------------------------------------------------------------------------------------------------------------
def _matrix(op: str, arg: str, x: Any) -> TensorView:
    v = view(x, op, arg)
    check_dtype(op, arg, v, _FLOATS)
    check_ndim(op, arg, v, 2)
    check_last_dim_contiguous(op, arg, v)
    if not 0 < v.shape[1] <= MAX_LEN:
        fail(op, arg, "has rows of an unsupported length", v.shape[1], f"1 to {MAX_LEN}")
    return v


def _ties(op: str, tie_break: int) -> bool:
    if tie_break not in (0, 1, 2):
        fail(op, "tie_break", "is unknown", tie_break, "TopKTieBreak.NONE, SMALL or LARGE")
    return tie_break == TopKTieBreak.LARGE


def _count(op: str, arg: str, x: int, most: int | None) -> int:
    n = int(x)
    if n < 1 or (most is not None and n > most):
        fail(op, arg, "is out of range", x, "1 or more" if most is None else f"1 to {most}")
    return n


def _int32(op: str, arg: str, x: Any, n: int, like: TensorView) -> TensorView:
    v = view(x, op, arg)
    check_dtype(op, arg, v, (INT32,))
    check_shape(op, arg, v, (n,))
    check_last_dim_contiguous(op, arg, v)
    check_same_device(op, {"input": like, arg: v})
    return v


# ---- dispatch ----------------------------------------------------------------------------------------------------------------------
def _most_sorted() -> int:
    from pyinfer.jit.topk import MOST_SORTED

    return MOST_SORTED


@functools.cache
def _kernel(device: int, dtype: str, sorted: bool, wide: bool) -> tuple[Any, bool]:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.topk import gen_top_k

    return gen_top_k(dtype, sorted, wide).build_and_load(device), pdl_supported(device)


def _select(
    v: TensorView,
    k: int,
    tie_large: bool,
    sorted: bool,
    *,
    indices: TensorView,
    values: TensorView | None = None,
    lengths: TensorView | None = None,
    next_n: int = 1,
    compress_ratio: int = 1,
    table: TensorView | None = None,
    row_to_batch: TensorView | None = None,
    offsets: TensorView | None = None,
) -> None:
    rows, n = v.shape
    if not rows:
        return
    if v.device < 0:
        _select_cpu(
            v, k, tie_large, sorted, indices, values, lengths, next_n, compress_ratio, table, row_to_batch, offsets
        )
        return
    kernel, pdl = _kernel(v.device, v.dtype.name, sorted, indices.dtype is INT64)

    def at(x: TensorView | None) -> int:
        return 0 if x is None else x.ptr

    packed = (
        v.ptr, v.strides[0], n, k, int(tie_large), at(lengths), next_n, compress_ratio, at(values), indices.ptr, at(table),
        0 if table is None else table.strides[0], at(row_to_batch), at(offsets),
    )  # fmt: skip
    kernel(current_stream(v), rows, packed, pdl)


def _select_cpu(
    v: TensorView, k: int, tie_large: bool, sorted: bool, indices: TensorView, values: TensorView | None, lengths: TensorView | None,
    next_n: int, compress_ratio: int, table: TensorView | None, row_to_batch: TensorView | None, offsets: TensorView | None,
) -> None:  # fmt: skip
    import numpy as np

    from pyinfer.cpu.storage import flat
    from pyinfer.cpu.threads import run
    from pyinfer.cpu.topk import top_k_rows

    rows, n = v.shape
    number = np.arange(rows)
    length = np.full(rows, n, np.int64)
    if lengths is not None:
        seen = as_numpy(lengths).astype(np.int64)[number // next_n] - next_n + number % next_n + 1
        length = np.minimum(np.maximum(seen, 0) // compress_ratio, n)
    ids = np.empty((rows, k), np.int64)
    memory, first = flat(v)
    run(top_k_rows, rows, memory, first, v.strides[0], length, k, tie_large, sorted, ids, grain=max(1, 16384 // n))
    there = ids >= 0
    safe = np.where(there, ids, 0)
    result = ids
    if table is not None:
        line = number if row_to_batch is None else as_numpy(row_to_batch)
        result = np.where(there, as_numpy(table)[line[:, None], safe], -1)
    elif offsets is not None:
        result = np.where(there, ids + as_numpy(offsets)[:, None], -1)
    as_numpy(indices)[:] = result
    if values is not None:
        source = as_numpy(v)
        taken = np.take_along_axis(source, safe, 1)
        as_numpy(values)[:] = np.where(there, taken, np.array(-np.inf, source.dtype))


def _sorted_by_framework(op: str, v: TensorView, values: Any, indices: Any, large: bool) -> tuple[Any, Any]:
    """Stable, so that equal values stay in the order of their indices (or against it: from behind)."""
    if v.framework != "torch":
        most = _most_sorted()
        fail(
            op,
            "k",
            "is too large to be sorted outside of torch",
            values.shape[1],
            f"{most} or less",
            "Take sorted=False.",
        )
    if large:
        values, indices = values.flip(-1), indices.flip(-1)
    # All NaNs as one: by torch's order those of negative sign are the smallest where it sorts by radix (long rows on a GPU).
    _, order = values.masked_fill(values != values, math.nan).sort(dim=-1, descending=True, stable=True)
    return values.gather(-1, order), indices.gather(-1, order)


topk = top_k

attach(__name__)  # what torch.compile traces in the place of these functions
