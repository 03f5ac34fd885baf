"""Tokens read out of a paged cache, and copies of whole pages: checks and launches behind `pyinfer.page`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer._page import (
    FLOATS,
    Names,
    Places,
    Two,
    accesses,
    check_places,
    checked_caches,
    given_scales,
    index_array,
    one_head,
    struct_values,
)
from pyinfer.core.dtypes import INT64, canonical_dtype
from pyinfer.core.errors import check_dtype, check_last_dim_contiguous, check_same_device, check_shape, fail, fail_type
from pyinfer.core.rows import common_row_layout, vector_length
from pyinfer.core.scales import FP8, Scale
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel


def gather_rows(
    op: str,
    names: Names,
    caches: Two,
    layout: str,
    heads: int,
    indices: tuple[Any, Any, Any, Any],
    outputs: tuple[Any, Any],
    scales: tuple[Any, Any],
    dtype: Any,
) -> tuple[Any, Any]:
    checked = checked_caches(op, names[1], caches, layout, heads, (caches[0].shape[-1], caches[1].shape[-1]))
    cache = checked[0]
    given = [None if o is None else view(o, op, arg) for o, arg in zip(outputs, names[0], strict=True)]
    like = next((i for i, row in enumerate(given) if row is not None), None)
    if dtype is not None:
        wanted, source = canonical_dtype(dtype, op, "dtype"), "dtype"
    else:
        wanted, source = (cache.dtype, "dtype") if like is None else (given[like].dtype, names[0][like])  # type: ignore[union-attr]
    convert = wanted is not cache.dtype
    if convert and not (cache.dtype in FP8 and wanted in FLOATS):
        fix = "Only 8-bit floats are converted, to float16, bfloat16 or float32."
        fail_type(op, source, "cannot be made", wanted.name, cache.dtype.name, fix)
    nnz = index_array(op, "batch_indices", indices[0]).shape[0]
    rows, results = [], []
    for i, c in enumerate(checked):
        shape = (nnz, c.shape[3]) if layout == "MLA" else (nnz, heads, c.shape[3])
        row, result = given[i], outputs[i]
        if row is None:
            result = empty(cache, shape, wanted)
            row = view(result)
        check_dtype(op, names[0][i], row, (wanted,))
        check_shape(op, names[0][i], row, shape)
        check_last_dim_contiguous(op, names[0][i], row)
        if row.device != cache.device:
            check_same_device(op, {names[1][0]: cache, names[0][i]: row})
        rows.append(one_head(row) if layout == "MLA" else row)
        results.append(result)
    places = check_places(op, names[0][0], rows[0], *indices, None, cache.shape[0], cache.shape[1])
    _gather((rows[0], rows[1]), checked, places, given_scales(op, names[2], scales, convert, cache, heads), op)
    return results[0], results[1]


def _gather(rows: Two, caches: Two, places: Places, scales: tuple[Scale, Scale] | None, op: str) -> None:
    """The reverse of `append`: what lies in the caches to `rows`, times `scales` if they are of another dtype."""
    key, value = rows
    nnz, heads = key.shape[:2]
    if not (nnz and heads and (key.shape[2] or value.shape[2])):
        return
    if key.device < 0:
        from pyinfer.cpu import page as cpu

        bases = places.bases(op)
        for i, (target, cache) in enumerate(zip(rows, caches, strict=True)):
            cpu.gather(target, cache, bases, None if scales is None else scales[i].numpy())
        return
    access, chunks, strides = accesses(rows, caches, scales is not None)
    dequantize = None if scales is None else (key.dtype.name, caches[0].dtype.name)
    kernel, has_pdl, per_block = _gather_kernel(key.device, access, heads, *chunks, dequantize)
    parts = -(-heads * max(chunks) // per_block)
    values, _ = struct_values(rows, caches, places, scales, strides, parts)
    kernel(current_stream(key), nnz * parts, values, has_pdl)


@functools.cache
def _gather_kernel(
    device: int, access: int, heads: int, key_chunks: int, value_chunks: int, dequantize: tuple[str, str] | None
) -> tuple[Kernel, bool, int]:
    """Kernel, whether the device has programmatic dependent launch, accesses per block."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import append_config, gen_gather

    block, unroll, _ = append_config(heads * max(key_chunks, value_chunks))
    kernel = gen_gather(access, heads, key_chunks, value_chunks, dequantize).build_and_load(device)
    return kernel, pdl_supported(device), block * unroll


def copy_tensor(
    op: str,
    tag: str,
    source: TensorView,
    target: TensorView,
    source_pages: TensorView,
    target_pages: TensorView,
    same: bool,
) -> None:
    """target[target_pages[i]] = source[source_pages[i]], both [pages, ...] of one page shape and dtype. `same`: they are one tensor."""
    pairs, shape = source_pages.shape[0], tuple(source.shape[1:])
    if source.device < 0:
        from pyinfer.cpu import page as cpu

        pages = as_numpy(source_pages), as_numpy(target_pages)
        for arg, found, limit in (
            ("source_pages", pages[0], source.shape[0]),
            ("target_pages", pages[1], target.shape[0]),
        ):
            if len(found) and (int(found.min()) < 0 or int(found.max()) >= limit):
                bad = int(found.min()) if int(found.min()) < 0 else int(found.max())
                fail(op, arg, "names no page", bad, f"0 to {limit - 1}")
        doubtful = cpu.doubtful_page(*pages, same)
        if doubtful >= 0:
            fail(
                op,
                "target_pages",
                "names a page that is a target twice, or a source too",
                doubtful,
                "targets apart from each other and from sources",
            )
        as_numpy(target)[pages[1]] = as_numpy(source)[pages[0]]
        return
    if not pairs or 0 in shape:
        return
    size = source.dtype.itemsize
    run = min(_run(source), _run(target))  # of one shape: what is side by side in both are the same axes
    (rows, inner, s_outer, s_inner), (_, _, t_outer, t_inner) = common_row_layout(
        op, "cache" + tag, _without_runs(source, run), "out" + tag, _without_runs(target, run)
    )
    strides = [s * size for s in (source.strides[0], s_outer, s_inner, target.strides[0], t_outer, t_inner)]
    bits = source.ptr | target.ptr | run * size
    for s in strides:
        bits |= s
    access = vector_length(1, bits)
    chunks = run * size // access
    kernel, per_block, has_pdl = _copy_kernel(source.device, access)
    parts = -(-rows * chunks // per_block)
    wide = (source_pages.dtype is INT64) | (target_pages.dtype is INT64) << 1
    values = (
        source.ptr, target.ptr, source_pages.ptr, target_pages.ptr, *strides, source.shape[0], target.shape[0], rows, inner, chunks, parts, wide,
    )  # fmt: skip
    kernel(current_stream(source), pairs * parts, values, has_pdl)


def _run(x: TensorView) -> int:
    """How many elements of a page of [pages, ...] lie side by side, from its first on."""
    run = 1
    for n, stride in zip(reversed(x.shape[1:]), reversed(x.strides[1:]), strict=True):
        if n != 1 and stride != run:
            break
        run *= n
    return run


def _without_runs(x: TensorView, run: int) -> TensorView:
    """A page of [pages, ...] as rows of one element, its last axes, which are `run` elements side by side, left out."""
    shape, strides = list(x.shape[1:]), list(x.strides[1:])
    while run > 1:
        run //= shape.pop()
        strides.pop()
    return TensorView(x.obj, x.ptr, (*shape, 1), (*strides, 1), x.dtype, x.device, x.framework)


@functools.cache
def _copy_kernel(device: int, access: int) -> tuple[Kernel, int, bool]:
    """Kernel, accesses per block, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import COPY_BLOCK, COPY_UNROLL, gen_copy_pages

    return gen_copy_pages(access).build_and_load(device), COPY_BLOCK * COPY_UNROLL, pdl_supported(device)
