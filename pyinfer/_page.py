"""Places of tokens in a paged cache, and the operators that go over them: checks and launches behind `pyinfer.page`."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import Calls, Source
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32, INT64, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    fail,
)
from pyinfer.core.rows import vector_length
from pyinfer.core.scales import FP8, Scale, given_scale, is_number
from pyinfer.core.tensor import TensorView, as_numpy, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

INTEGERS = (INT32, INT64)
FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
append_calls = Calls()


@dataclass(frozen=True)
class Places:
    """Index arrays that say where tokens lie in a cache, checked.

    Attributes
    ----------
    arrays
        batch_indices, positions, kv_indices, kv_indptr.
    num_pages, page_size
        The cache's.
    """

    arrays: tuple[TensorView, TensorView, TensorView, TensorView]
    num_pages: int
    page_size: int

    @property
    def batch(self) -> int:
        """Requests."""
        return self.arrays[3].shape[0] - 1

    @property
    def num_indices(self) -> int:
        """Entries of the page table."""
        return self.arrays[2].shape[0]

    @property
    def wide(self) -> int:
        """A bit for each array that is int64, as `cuda_src/page/place.cuh` reads them."""
        bits = 0
        for i, x in enumerate(self.arrays):
            bits |= (x.dtype is INT64) << i
        return bits

    def bases(self, op: str) -> tuple[Any, Any]:
        """On the CPU: page (-1: nowhere) and slot of every token. ValueError for a token without a place."""
        from pyinfer.cpu import page as cpu

        arrays = [as_numpy(x) for x in self.arrays]
        requests, positions, pages, indptr = arrays
        what, token, page_of, slot_of = cpu.locate(requests, positions, pages, indptr, self.page_size, self.num_pages)
        if what != cpu.OK:
            _fail_token(op, what, token, arrays, self.batch, self.page_size, self.num_pages)
        return page_of, slot_of


def index_array(op: str, arg: str, x: Any) -> TensorView:
    """An int32 or int64 tensor of one axis."""
    v = view(x, op, arg)
    check_dtype(op, arg, v, INTEGERS)
    check_ndim(op, arg, v, 1)
    check_last_dim_contiguous(op, arg, v)
    return v


def batch_of(op: str, arg: str, indptr: TensorView) -> int:
    """Requests of an indptr."""
    if not indptr.shape[0]:
        fail(op, arg, "is empty", 0, "batch + 1 entries")
    return indptr.shape[0] - 1


def check_places(
    op: str,
    rows_arg: str,
    rows: TensorView,
    batch_indices_: Any,
    positions_: Any,
    kv_indices_: Any,
    kv_indptr_: Any,
    kv_last_page_len_: Any,
    num_pages: int,
    page_size: int,
) -> Places:
    """Check the index arrays of `rows` (whose first axis is tokens). kv_last_page_len may be None."""
    nnz = rows.shape[0]
    batch_indices, positions = (
        index_array(op, "batch_indices", batch_indices_),
        index_array(op, "positions", positions_),
    )
    kv_indices, kv_indptr = index_array(op, "kv_indices", kv_indices_), index_array(op, "kv_indptr", kv_indptr_)
    last = None if kv_last_page_len_ is None else index_array(op, "kv_last_page_len", kv_last_page_len_)
    check_shape(op, "batch_indices", batch_indices, (nnz,))
    check_shape(op, "positions", positions, (nnz,))
    batch = batch_of(op, "kv_indptr", kv_indptr)
    if last is not None:
        check_shape(op, "kv_last_page_len", last, (batch,))
    arrays = (batch_indices, positions, kv_indices, kv_indptr)
    if any(x.device != rows.device for x in arrays):
        names = ("batch_indices", "positions", "kv_indices", "kv_indptr")
        check_same_device(op, {rows_arg: rows, **dict(zip(names, arrays, strict=True))})
    return Places(arrays, num_pages, page_size)


def check_cache(
    op: str, arg: str, cache: TensorView, layout: str, heads: int, dim: int, dtypes: Collection[DType]
) -> TensorView:
    """A cache as [pages, page_size, heads, dim], from "NHD", "HND" or "MLA" ([pages, page_size, dim])."""
    from pyinfer._attention import check_layout

    shape, strides = tuple(cache.shape), tuple(cache.strides)
    if layout == "MLA":
        check_ndim(op, arg, cache, 3)
        check_shape(op, arg, cache, (None, None, dim))
        shape, strides = (*shape[:2], 1, dim), (*strides[:2], 0, strides[2])
    else:
        check_layout(op, layout)
        check_ndim(op, arg, cache, 4)
        slot, head = (1, 2) if layout == "NHD" else (2, 1)
        wanted: list[int | None] = [None, None, None, dim]
        wanted[head] = heads
        check_shape(op, arg, cache, tuple(wanted))
        shape, strides = (shape[0], shape[slot], heads, dim), (strides[0], strides[slot], strides[head], strides[3])
    check_dtype(op, arg, cache, dtypes)
    check_last_dim_contiguous(op, arg, cache)
    if not shape[1]:
        fail(op, arg, "has pages of no tokens", 0, "page_size 1 or more")
    return TensorView(cache.obj, cache.ptr, shape, strides, cache.dtype, cache.device, cache.framework)


Two = tuple[TensorView, TensorView]


def with_scales(
    scalars: tuple[Any, ...], tensors: tuple[Any, ...], first: Any, second: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the call is recognised by with two scales: numbers among the scalars, tensors among the tensors."""
    scales = [1.0 if s is None else s for s in (first, second)]
    numbers = tuple([float(s) if is_number(s) else None for s in scales])
    more = tuple([s for s in scales if not is_number(s)])
    return (*scalars, numbers), (*tensors, *more)


def one_head(x: TensorView) -> TensorView:
    """[tokens, dim] as [tokens, 1, dim]."""
    shape, strides = (x.shape[0], 1, x.shape[1]), (x.strides[0], 0, x.strides[1])
    return TensorView(x.obj, x.ptr, shape, strides, x.dtype, x.device, x.framework)


Names = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]


def checked_caches(op: str, names: tuple[str, str], caches: Two, layout: str, heads: int, dims: tuple[int, int]) -> Two:
    """Both as [pages, page_size, heads, dim], of one dtype and equal pages."""
    dtype = (caches[0].dtype,)
    first = check_cache(op, names[0], caches[0], layout, heads, dims[0], dtype)
    second = check_cache(op, names[1], caches[1], layout, heads, dims[1], dtype)
    check_shape(op, names[1], second, (*first.shape[:2], None, None))
    if first.device != second.device:
        check_same_device(op, {names[0]: first, names[1]: second})
    return first, second


def given_scales(
    op: str, names: tuple[str, str], given: tuple[Any, Any], convert: bool, like: TensorView, heads: int
) -> tuple[Scale, Scale] | None:
    if not convert:
        for name, scale in zip(names, given, strict=True):
            if scale is not None:
                fix = "Leave it out; the attention takes it."
                fail(
                    op, name, "is given where nothing is rounded", scale if is_number(scale) else "a tensor", None, fix
                )
        return None
    first, second = (
        given_scale(op, n, 1.0 if s is None else s, like, heads) for n, s in zip(names, given, strict=True)
    )
    return first, second


def append_rows(
    op: str,
    scalars: tuple[Any, ...],
    tensors: tuple[Any, ...],
    names: Names,
    rows: Two,
    caches: Two,
    layout: str,
    index_tensors: tuple[Any, Any, Any, Any, Any],
    first_scale: Any,
    second_scale: Any,
) -> None:
    key = rows[0]
    convert = caches[0].dtype in FP8 and key.dtype in FLOATS
    for arg, row, cache_arg, cache in zip(names[0], rows, names[1], caches, strict=True):
        if convert:
            check_same_dtype(op, arg, row, names[0][0], key)
        else:
            check_same_dtype(op, arg, row, cache_arg, cache)
        check_shape(op, arg, row, (*key.shape[:2], None))
        check_last_dim_contiguous(op, arg, row)
        if row.device != key.device or cache.device != key.device:
            check_same_device(op, {names[0][0]: key, arg: row, cache_arg: cache})
    heads, dims = key.shape[1], (key.shape[2], rows[1].shape[2])
    checked = checked_caches(op, names[1], caches, layout, heads, dims)
    places = check_places(op, names[0][0], key, *index_tensors, checked[0].shape[0], checked[0].shape[1])
    scales = given_scales(op, names[2], (first_scale, second_scale), convert, key, heads)
    _append(scalars, tensors, rows, checked, places, scales, op)


def _append(
    scalars: Any,
    tensors: tuple[Any, ...],
    rows: Two,
    caches: Two,
    places: Places,
    scales: tuple[Scale, Scale] | None,
    op: str,
) -> None:
    """Rows [nnz, heads, dim] of keys and of values into caches [pages, page_size, heads, dim] (checked).

    `scalars`, `tensors`: what `append_calls` is asked with.
    """
    key, value = rows
    nnz, heads = key.shape[:2]
    if not (nnz and heads and (key.shape[2] or value.shape[2])):
        return
    if key.device < 0:
        from pyinfer.cpu import page as cpu

        bases = places.bases(op)
        for i, (source, cache) in enumerate(zip(rows, caches, strict=True)):
            if scales is None:
                cpu.append(source, cache, (cache.strides[0], cache.strides[1], cache.strides[2]), *bases)
            else:
                cpu.append_quantized(source, cache, bases, scales[i].numpy())
        return
    access, chunks, strides = accesses(rows, caches, scales is not None)
    quantize = None if scales is None else (key.dtype.name, caches[0].dtype.name)
    kernel, has_pdl, config = _append_kernel(key.device, access, heads, *chunks, quantize)
    parts = -(-heads * max(chunks) // (config[0] * config[1]))
    values, pointers = struct_values(rows, caches, places, scales, strides, parts)
    aligned = not (key.ptr | value.ptr | caches[0].ptr | caches[1].ptr) & 15
    # key, value, one cache or two, batch_indices, positions, kv_indices, kv_indptr; kv_last_page_len is not passed on; scales that are tensors.
    count = sum(1 for s in scales or () if s.tensor is not None)
    pair = len(tensors) - count == 9
    second = (3, 0) if pair else (2, caches[1].ptr - caches[0].ptr)
    recipe: list[Source] = [(0, 0), (1, 0), (2, 0), second, *((i, 0) for i in range(3 + pair, 7 + pair))]
    at = len(tensors) - count
    for s in scales or ():
        recipe.append(None if s.tensor is None else (at, 0))
        at += s.tensor is not None
    grid = -(-nnz // config[2]) * parts
    append_calls.launch(
        scalars,
        tensors,
        key,
        kernel,
        grid,
        values,
        pointers,
        has_pdl and scalars[2],
        aligned,
        recipe=tuple(recipe),
        wants=4,
    )


def accesses(rows: Two, caches: Two, convert: bool) -> tuple[int, tuple[int, int], list[int]]:
    """(bytes per access on the rows' side, accesses per head of keys and of values, strides: in elements if `convert`, else in bytes)."""
    size, cache_size = rows[0].dtype.itemsize, caches[0].dtype.itemsize
    bits = 0
    for group, factor in ((rows, 1), (caches, size // cache_size)):
        for x in group:
            bits |= x.ptr * factor | x.shape[-1] * size
            for s in x.strides[:-1]:
                bits |= s * size
    access = size * vector_length(size, bits) if convert else vector_length(1, bits)
    factor = 1 if convert else size
    chunks = (rows[0].shape[-1] * size // access, rows[1].shape[-1] * size // access)
    strides = [s * factor for x in rows for s in x.strides[:2]] + [s * factor for c in caches for s in c.strides[:3]]
    return access, chunks, strides


def struct_values(
    rows: Two, caches: Two, places: Places, scales: tuple[Scale, Scale] | None, strides: list[int], parts: int
) -> tuple[tuple[Any, ...], int]:
    """The fields of either kernel's struct, and how many of them are pointers."""
    more = () if scales is None else (scales[0].ptr, scales[1].ptr)
    pointers = (*(x.ptr for x in (*rows, *caches, *places.arrays)), *more)
    last: tuple[float, ...] = ()
    if scales is not None:
        last = (scales[0].value, scales[1].value, int(scales[0].size > 1), int(scales[1].size > 1))
    counts = (
        places.num_indices,
        places.num_pages,
        places.batch,
        places.page_size,
        rows[0].shape[1],
        parts,
        rows[0].shape[0],
        places.wide,
    )
    return (*pointers, *strides, *counts, *last), len(pointers)


def _fail_token(op: str, what: int, token: int, arrays: list[Any], batch: int, page_size: int, num_pages: int) -> None:
    from pyinfer.cpu import page as cpu

    batch_indices, positions, kv_indices, kv_indptr = arrays
    request, position = int(batch_indices[token]), int(positions[token])
    if what == cpu.BAD_REQUEST:
        fail(op, "batch_indices", f"names no request (token {token})", request, f"less than {batch}")
    pages = int(kv_indptr[request + 1]) - int(kv_indptr[request])
    if what == cpu.BAD_POSITION:
        fix = "The page table must already count the tokens."
        fail(
            op,
            "positions",
            f"lies beyond the pages of request {request} (token {token})",
            position,
            f"less than {pages} pages of {page_size}",
            fix,
        )
    page = int(kv_indices[int(kv_indptr[request]) + position // page_size])
    fail(op, "kv_indices", f"names no page (token {token} of request {request})", page, f"0 to {num_pages - 1}")


@functools.cache
def _append_kernel(
    device: int, access: int, heads: int, key_chunks: int, value_chunks: int, quantize: tuple[str, str] | None = None
) -> tuple[Kernel, bool, tuple[int, int, int]]:
    """Kernel, whether it was built for programmatic dependent launch, its `append_config`."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import append_config, gen_append

    config = append_config(heads * max(key_chunks, value_chunks))
    kernel = gen_append(access, heads, key_chunks, value_chunks, quantize=quantize).build_and_load(device)
    return kernel, pdl_supported(device), config
