"""Upkeep of a paged KV cache: where new tokens go, and putting them there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer._attention import check_layout, paged_views
from pyinfer._page import append_calls, append_rows, batch_of, index_array, one_head, with_scales
from pyinfer._page_moves import copy_tensor, gather_rows
from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import INT32, INT64
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    fail,
)
from pyinfer.core.tensor import as_numpy, current_stream, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "block_sparse_indices_to_vector_sparse_offsets",
    "copy_pages",
    "gather_paged_kv_cache",
    "gather_paged_mla_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
]

_position_calls, _length_calls = Calls(), Calls()


def get_batch_indices_positions(
    append_indptr: Any, seq_lens: Any, nnz: int, batch_indices: Any = None, positions: Any = None
) -> tuple[Any, Any]:
    """Request and position of every appended token.

    Row t belongs to request b with append_indptr[b] <= t < append_indptr[b + 1]; a request's last appended token has position
    seq_lens[b] - 1. Never synchronises on a GPU.

    Parameters
    ----------
    append_indptr
        int32 or int64 [batch + 1].
    seq_lens
        int32 or int64 [batch]: lengths with the appended tokens counted.
    nnz
        Number of rows. Rows that belong to no request get -1 in both results (`append_paged_kv_cache` leaves such rows out), so a fixed nnz may
        serve a CUDA graph.
    batch_indices, positions
        int32 [nnz] to write to; allocated if None.

    Returns
    -------
    (batch_indices, positions), int32 [nnz], on the device of append_indptr.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or shape; on the CPU also for an append_indptr that is not monotone or goes beyond nnz.
    """
    op = "get_batch_indices_positions"
    given = (batch_indices is not None) + (positions is not None)
    known = (append_indptr, seq_lens, *((batch_indices, positions) if given else ()))
    scalars = (nnz, given)
    result: Any = _position_calls.run(scalars, known) if given != 1 else MISS
    if result is not MISS:
        return (batch_indices, positions) if given else result
    indptr, lengths = index_array(op, "append_indptr", append_indptr), index_array(op, "seq_lens", seq_lens)
    batch = batch_of(op, "append_indptr", indptr)
    check_shape(op, "seq_lens", lengths, (batch,))
    check_same_device(op, {"append_indptr": indptr, "seq_lens": lengths})
    nnz = int(nnz)
    if nnz < 0:
        fail(op, "nnz", "is negative", nnz, "the number of rows")
    outputs = []
    for arg, target in (("batch_indices", batch_indices), ("positions", positions)):
        obj = empty(indptr, (nnz,), INT32) if target is None else target
        out = view(obj, op, arg)
        if target is not None:
            check_dtype(op, arg, out, (INT32,))
            check_shape(op, arg, out, (nnz,))
            check_last_dim_contiguous(op, arg, out)
            check_same_device(op, {"append_indptr": indptr, arg: out})
        outputs.append((obj, out))
    (first, first_view), (second, second_view) = outputs
    if not nnz:
        return first, second
    if indptr.device < 0:
        from pyinfer.cpu import page as cpu

        host = as_numpy(indptr)
        if (host[1:] < host[:-1]).any() or host[0] < 0:
            fail(op, "append_indptr", "is not monotone", host.tolist(), "non-decreasing row numbers from 0")
        if host[-1] > nnz:
            fail(op, "nnz", "is less than append_indptr[-1]", nnz, f"{int(host[-1])} or more")
        cpu.batch_indices_positions(host, as_numpy(lengths), as_numpy(first_view), as_numpy(second_view))
        return first, second
    kernel, has_pdl = _kernel(indptr.device, "batch_positions")
    wide = (indptr.dtype is INT64) | (lengths.dtype is INT64) << 1
    stretches = min(64, max(1, nnz // (1024 * max(1, batch))))
    values = (indptr.ptr, lengths.ptr, first_view.ptr, second_view.ptr, nnz, batch, wide)
    whole = given != 1  # one given, one not: nothing `find` could be asked with
    allocated = () if given else (((nnz,), INT32),) * 2
    grid = (batch + 1, stretches, 1)
    _position_calls.launch(scalars, known, indptr, kernel, grid, values, 4, has_pdl, whole, allocated, wants=0)
    return first, second


def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """Lengths of requests from their page table: ``max(pages - 1, 0) * page_size + kv_last_page_len``.

    Parameters
    ----------
    kv_indptr
        int32 or int64 [batch + 1]: pages of request b are kv_indptr[b] to kv_indptr[b + 1] - 1.
    kv_last_page_len
        int32 or int64 [batch]: tokens in each request's last page, 1 to page_size, or 0 for an empty request.
    page_size
        Tokens per page.

    Returns
    -------
    int32 [batch], on the device of kv_indptr.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or shape.
    """
    op = "get_seq_lens"
    given_page_size = page_size
    out = _length_calls.run(page_size, (kv_indptr, kv_last_page_len))
    if out is not MISS:
        return out
    indptr, last = index_array(op, "kv_indptr", kv_indptr), index_array(op, "kv_last_page_len", kv_last_page_len)
    batch = batch_of(op, "kv_indptr", indptr)
    check_shape(op, "kv_last_page_len", last, (batch,))
    check_same_device(op, {"kv_indptr": indptr, "kv_last_page_len": last})
    page_size = int(page_size)
    if page_size < 1:
        fail(op, "page_size", "is too small", page_size, "1 or more")
    out = empty(indptr, (batch,), INT32)
    if not batch:
        return out
    if indptr.device < 0:
        import numpy as np

        pages = np.diff(as_numpy(indptr))
        as_numpy(view(out))[:] = np.maximum(pages - 1, 0) * page_size + as_numpy(last)
        return out
    kernel, has_pdl = _kernel(indptr.device, "seq_lens")
    wide = (indptr.dtype is INT64) | (last.dtype is INT64) << 1
    values = (indptr.ptr, last.ptr, view(out).ptr, page_size, batch, wide)
    tensors, outputs = (kv_indptr, kv_last_page_len), (((batch,), INT32),)
    _length_calls.launch(
        given_page_size, tensors, indptr, kernel, -(-batch // 128), values, 3, has_pdl, outputs=outputs, wants=0
    )
    return out


def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    k_scale: Any = None,
    v_scale: Any = None,
    enable_pdl: bool | None = None,
) -> None:
    """Write new keys and values into a paged KV cache, whose page table already counts them.

    Token t goes to page ``kv_indices[kv_indptr[b] + positions[t] // page_size]``, slot ``positions[t] % page_size``, with
    ``b = batch_indices[t]``. Tokens with a negative batch index or position are left out.

    Parameters
    ----------
    append_key, append_value
        [nnz, num_kv_heads, head_dim], dtype of the cache; any strides but a contiguous last axis. The head dims of keys and values may differ.
        float16, bfloat16 or
        float32 also for a cache of 8-bit floats: they are rounded on the way.
    batch_indices, positions
        int32 or int64 [nnz], see `get_batch_indices_positions`.
    paged_kv_cache
        A tuple (k_cache, v_cache) of [pages, page_size, num_kv_heads, head_dim] (NHD) or [pages, num_kv_heads, page_size, head_dim] (HND), or one
        tensor of both with an axis of size 2 in second place. The page axis may be missing: pages of one token. Outer strides are free and 64 bits wide.
    kv_indices
        int32 or int64 [kv_indptr[-1] or more]: page numbers.
    kv_indptr
        int32 or int64 [batch + 1].
    kv_last_page_len
        int32 or int64 [batch]; only its shape is looked at: positions say it all.
    kv_layout
        "NHD" or "HND".
    k_scale, v_scale
        For a cache of 8-bit floats and keys of another dtype: what a stored value is worth (the same that the attention is given), a positive number
        or a float32 tensor of one
        element, or of one a head. ``stored = key / k_scale``, saturating; 1 if None.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Raises
    ------
    TypeError
        For dtypes that differ, or a list of caches.
    ValueError
        For shapes, devices or a layout that do not fit, or a scale where nothing is rounded. On the CPU also for a token without a place: a batch
        index or page out of range,
        a position beyond the request's pages; nothing is written then. On a GPU such tokens are left out, since finding them would take a synchronisation.
    """
    op = "append_paged_kv_cache"
    index_tensors = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    pair = type(paged_kv_cache) is tuple and len(paged_kv_cache) == 2
    tensors = (append_key, append_value, *(paged_kv_cache if pair else (paged_kv_cache,)), *index_tensors)
    scalars: tuple[Any, ...] = (kv_layout, len(tensors), enable_pdl is not False)
    if k_scale is not None or v_scale is not None:
        scalars, tensors = with_scales(scalars, tensors, k_scale, v_scale)
    if append_calls.run(scalars, tensors) is not MISS:
        return
    check_layout(op, kv_layout)
    key, value = view(append_key, op, "append_key"), view(append_value, op, "append_value")
    check_ndim(op, "append_key", key, 3)
    check_ndim(op, "append_value", value, 3)
    caches = paged_views(op, paged_kv_cache, kv_layout, 1)
    names = ("append_key", "append_value"), ("paged_kv_cache (K)", "paged_kv_cache (V)"), ("k_scale", "v_scale")
    append_rows(op, scalars, tensors, names, (key, value), caches, kv_layout, index_tensors, k_scale, v_scale)


def append_paged_mla_kv_cache(
    append_ckv: Any,
    append_kpe: Any,
    batch_indices: Any,
    positions: Any,
    ckv_cache: Any,
    kpe_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    ckv_scale: Any = None,
    kpe_scale: Any = None,
    enable_pdl: bool | None = None,
) -> None:
    """As `append_paged_kv_cache` for multi-head latent attention: one compressed head.

    Parameters
    ----------
    append_ckv, append_kpe
        [nnz, head_dim_ckv] and [nnz, head_dim_kpe] (512 and 64 in DeepSeek's models), dtype of the caches, or to be rounded to it.
    ckv_cache, kpe_cache
        [pages, page_size, head_dim_ckv] and [pages, page_size, head_dim_kpe].
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len
        As in `append_paged_kv_cache`.
    ckv_scale, kpe_scale
        As k_scale and v_scale there.
    enable_pdl
        As there.

    Raises
    ------
    TypeError, ValueError
        As `append_paged_kv_cache`.
    """
    op = "append_paged_mla_kv_cache"
    index_tensors = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    tensors: tuple[Any, ...] = (append_ckv, append_kpe, ckv_cache, kpe_cache, *index_tensors)
    scalars: tuple[Any, ...] = (op, 9, enable_pdl is not False)
    if ckv_scale is not None or kpe_scale is not None:
        scalars, tensors = with_scales(scalars, tensors, ckv_scale, kpe_scale)
    if append_calls.run(scalars, tensors) is not MISS:
        return
    sources = []
    for arg, x in (("append_ckv", append_ckv), ("append_kpe", append_kpe)):
        v = view(x, op, arg)
        check_ndim(op, arg, v, 2)
        sources.append(one_head(v))
    caches = view(ckv_cache, op, "ckv_cache"), view(kpe_cache, op, "kpe_cache")
    names = ("append_ckv", "append_kpe"), ("ckv_cache", "kpe_cache"), ("ckv_scale", "kpe_scale")
    append_rows(
        op, scalars, tensors, names, (sources[0], sources[1]), caches, "MLA", index_tensors, ckv_scale, kpe_scale
    )


def gather_paged_kv_cache(
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_layout: str = "NHD",
    k_out: Any = None,
    v_out: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    dtype: Any = None,
) -> tuple[Any, Any]:
    """Read keys and values of tokens out of a paged KV cache into ragged tensors: the reverse of `append_paged_kv_cache`.

    Row t is what lies at page ``kv_indices[kv_indptr[b] + positions[t] // page_size]``, slot ``positions[t] % page_size``, ``b = batch_indices[t]``.
    Rows of tokens with a
    negative batch index or position become zeros.

    Parameters
    ----------
    batch_indices, positions
        int32 or int64 [nnz], see `get_batch_indices_positions` (with kv lengths as both arguments' lengths it lists every token of every request).
    paged_kv_cache, kv_indices, kv_indptr, kv_layout
        As in `append_paged_kv_cache`.
    k_out, v_out
        Where to write, [nnz, num_kv_heads, head_dim]. Allocated if None.
    k_scale, v_scale
        For a cache of 8-bit floats and results of another dtype: what values are multiplied by, as in `append_paged_kv_cache`; 1 if None.
    dtype
        Of the results: that of the outputs given, or the cache's, if None; float16, bfloat16 or float32 where the cache holds 8-bit floats.

    Returns
    -------
    (keys, values), [nnz, num_kv_heads, head_dim].

    Raises
    ------
    TypeError, ValueError
        As `append_paged_kv_cache`.
    """
    op = "gather_paged_kv_cache"
    check_layout(op, kv_layout)
    caches = paged_views(op, paged_kv_cache, kv_layout, 1)
    heads = caches[0].shape[2 if kv_layout == "NHD" else 1]
    names = ("k_out", "v_out"), ("paged_kv_cache (K)", "paged_kv_cache (V)"), ("k_scale", "v_scale")
    indices = (batch_indices, positions, kv_indices, kv_indptr)
    return gather_rows(op, names, caches, kv_layout, heads, indices, (k_out, v_out), (k_scale, v_scale), dtype)


def gather_paged_mla_kv_cache(
    batch_indices: Any,
    positions: Any,
    ckv_cache: Any,
    kpe_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    ckv_out: Any = None,
    kpe_out: Any = None,
    ckv_scale: Any = None,
    kpe_scale: Any = None,
    dtype: Any = None,
) -> tuple[Any, Any]:
    """As `gather_paged_kv_cache` for multi-head latent attention.

    Caches as in `append_paged_mla_kv_cache`, results [nnz, head_dim_ckv] and [nnz, head_dim_kpe].
    """
    op = "gather_paged_mla_kv_cache"
    indices = (batch_indices, positions, kv_indices, kv_indptr)
    caches = view(ckv_cache, op, "ckv_cache"), view(kpe_cache, op, "kpe_cache")
    names = ("ckv_out", "kpe_out"), ("ckv_cache", "kpe_cache"), ("ckv_scale", "kpe_scale")
    return gather_rows(op, names, caches, "MLA", 1, indices, (ckv_out, kpe_out), (ckv_scale, kpe_scale), dtype)


def copy_pages(cache: Any, source_pages: Any, target_pages: Any, out: Any = None) -> None:
    """Copy whole pages: ``out[target_pages[i]] = cache[source_pages[i]]``, for copy-on-write, defragmentation or moving between caches of one device.

    Pages are copied in no particular order: none may be a target twice, or source and target (of the same cache).

    Parameters
    ----------
    cache
        A tensor [pages, ...] of any dtype, or a tuple of such tensors (keys and values, latent and rotary part, scales).
    source_pages, target_pages
        int32 or int64 [n].
    out
        Caches of the same page shapes and dtypes to copy to, as `cache` is given; cache itself if None.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes, strides or devices that do not fit. On the CPU also for a page that does not exist, or that is a target twice or both
        source and target; nothing is
        written then. On a GPU pairs with a page that does not exist are left out.
    """
    op = "copy_pages"
    sources = cache if type(cache) is tuple else (cache,)
    targets = sources if out is None else out if type(out) is tuple else (out,)
    if len(sources) != len(targets):
        fail(op, "out", "has another number of tensors than cache", len(targets), len(sources))
    from_pages, to_pages = index_array(op, "source_pages", source_pages), index_array(op, "target_pages", target_pages)
    check_shape(op, "target_pages", to_pages, tuple(from_pages.shape))
    jobs = []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        tag = f"[{i}]" if type(cache) is tuple else ""
        s = view(source, op, f"cache{tag}")
        t = s if out is None else view(target, op, f"out{tag}")
        if not s.shape:
            check_ndim(op, f"cache{tag}", s, (1, 2, 3, 4, 5))
        check_same_dtype(op, f"out{tag}", t, f"cache{tag}", s)
        check_shape(op, f"out{tag}", t, (None, *s.shape[1:]))
        check_same_device(op, {f"cache{tag}": s, f"out{tag}": t, "source_pages": from_pages, "target_pages": to_pages})
        jobs.append((tag, s, t))
    for tag, s, t in jobs:
        copy_tensor(op, tag, s, t, from_pages, to_pages, out is None)


def block_sparse_indices_to_vector_sparse_offsets(
    indices: Any,
    indptr: Any,
    out_offsets: Any,
    out_indptr: Any,
    kv_lens: Any,
    stride_block: int,
    stride_n: int,
    block_size: int,
) -> Any:
    """Offsets of single tokens from indices of blocks (pages): ``page * stride_block + slot * stride_n``, request by request.

    Parameters
    ----------
    indices
        int32 [indptr[-1] or more].
    indptr, out_indptr
        int32 [batch + 1]: where each request's blocks and tokens begin. The latter counts kv_lens up.
    out_offsets
        int32 [out_indptr[-1] or more]: written. Not looked at with block_size 1.
    kv_lens
        int32 [batch]: tokens of each request.
    stride_block, stride_n
        Elements from block to block, and from token to token.
    block_size
        Tokens per block. With 1 the result is ``indices * stride_block``, a new tensor.

    Returns
    -------
    out_offsets, or the new tensor.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape or device. On the CPU also for an offset beyond 32 bits, or more tokens than there is room or are blocks for.
    """
    op = "block_sparse_indices_to_vector_sparse_offsets"
    names = ("indices", "indptr", "out_offsets", "out_indptr", "kv_lens")
    given = (indices, indptr, out_offsets, out_indptr, kv_lens)
    if block_size < 1:
        fail(op, "block_size", "is too small", block_size, "1 or more")
    if block_size == 1:
        check_dtype(op, names[0], index_array(op, names[0], indices), (INT32,))
        return indices * stride_block
    views = [index_array(op, name, x) for name, x in zip(names, given, strict=True)]
    for name, v in zip(names, views, strict=True):
        check_dtype(op, name, v, (INT32,))
    check_same_device(op, dict(zip(names, views, strict=True)))
    blocks, offsets = views[0], views[2]
    batch = batch_of(op, names[1], views[1])
    check_shape(op, names[3], views[3], (batch + 1,))
    check_shape(op, names[4], views[4], (batch,))
    if not batch:
        return out_offsets
    if blocks.device < 0:
        from pyinfer.cpu import page as cpu

        arrays = [as_numpy(v) for v in views]
        problem = cpu.vector_offsets(arrays, stride_block, stride_n, block_size)
        if problem is not None:
            request, what, got, wanted = problem
            fail(op, "kv_lens", f"{what} (request {request})", got, wanted)
        return out_offsets
    kernel, has_pdl = _kernel(blocks.device, "vector_offsets")
    stretches = min(64, max(1, offsets.shape[0] // (1024 * batch)))
    values = (*(v.ptr for v in views), int(stride_block), int(stride_n), int(block_size))
    kernel(current_stream(blocks), (batch, stretches, 1), values, has_pdl)
    return out_offsets


@functools.cache
def _kernel(device: int, name: str) -> tuple[Kernel, bool]:
    """Kernel, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit import page

    gen = {
        "batch_positions": page.gen_batch_positions,
        "seq_lens": page.gen_seq_lens,
        "vector_offsets": page.gen_vector_offsets,
    }
    spec = gen[name]()
    return spec.build_and_load(device), pdl_supported(device)


attach(__name__)  # what torch.compile traces in the place of these functions
