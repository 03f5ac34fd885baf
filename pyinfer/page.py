"""Upkeep of a paged KV cache: where new tokens go, and putting them there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer._attention import check_layout, paged_views
from pyinfer.core.calls import Calls
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
from pyinfer.core.rows import vector_length
from pyinfer.core.tensor import TensorView, as_numpy, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = ["append_paged_kv_cache", "append_paged_mla_kv_cache", "get_batch_indices_positions", "get_seq_lens"]

_INTEGERS = (INT32, INT64)
_append_calls, _position_calls, _length_calls = Calls(), Calls(), Calls()


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
    call = _position_calls.find(scalars, known)
    if call is not None:
        ptr = call.ptr
        first, second = (batch_indices, positions) if given else call.new()
        call.launch(call.stream(call.device), ptr(append_indptr), ptr(seq_lens), ptr(first), ptr(second))
        return first, second
    indptr, lengths = _index(op, "append_indptr", append_indptr), _index(op, "seq_lens", seq_lens)
    batch = _batch(op, "append_indptr", indptr)
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
    _position_calls.launch(scalars, known, indptr, kernel, grid, values, 4, has_pdl, whole, allocated)
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
    call = _length_calls.find(page_size, (kv_indptr, kv_last_page_len))
    if call is not None:
        out = call.new()
        call.launch(call.stream(call.device), call.ptr(kv_indptr), call.ptr(kv_last_page_len), call.ptr(out))
        return out
    indptr, last = _index(op, "kv_indptr", kv_indptr), _index(op, "kv_last_page_len", kv_last_page_len)
    batch = _batch(op, "kv_indptr", indptr)
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
        given_page_size, tensors, indptr, kernel, -(-batch // 128), values, 3, has_pdl, outputs=outputs
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
) -> None:
    """Write new keys and values into a paged KV cache, whose page table already counts them.

    Token t goes to page ``kv_indices[kv_indptr[b] + positions[t] // page_size]``, slot ``positions[t] % page_size``, with
    ``b = batch_indices[t]``. Tokens with a negative batch index or position are left out.

    Parameters
    ----------
    append_key, append_value
        [nnz, num_kv_heads, head_dim], dtype of the cache; any strides but a contiguous last axis. The head dims of keys and values may differ.
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

    Raises
    ------
    TypeError
        For dtypes that differ, or a list of caches.
    ValueError
        For shapes, devices or a layout that do not fit. On the CPU also for a token without a place: a batch index or page out of range, a position beyond the
        request's pages; nothing is written then. On a GPU such tokens are left out, since finding them would take a synchronisation.
    """
    op = "append_paged_kv_cache"
    index_tensors = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    pair = type(paged_kv_cache) is tuple and len(paged_kv_cache) == 2
    tensors = (append_key, append_value, *(paged_kv_cache if pair else (paged_kv_cache,)), *index_tensors)
    scalars = (kv_layout, len(tensors))
    if _append_again(scalars, tensors):
        return
    check_layout(op, kv_layout)
    key, value = view(append_key, op, "append_key"), view(append_value, op, "append_value")
    check_ndim(op, "append_key", key, 3)
    check_ndim(op, "append_value", value, 3)
    k_cache, v_cache = paged_views(op, paged_kv_cache, kv_layout, 1)
    slot_axis, head_axis = (1, 2) if kv_layout == "NHD" else (2, 1)
    _append(
        scalars, tensors, op, ("append_key", "append_value"), (key, value), ("paged_kv_cache (K)", "paged_kv_cache (V)"), (k_cache, v_cache),
        slot_axis, head_axis, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len,
    )  # fmt: skip


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
) -> None:
    """As `append_paged_kv_cache` for multi-head latent attention: one compressed head.

    Parameters
    ----------
    append_ckv, append_kpe
        [nnz, head_dim_ckv] and [nnz, head_dim_kpe] (512 and 64 in DeepSeek's models), dtype of the caches.
    ckv_cache, kpe_cache
        [pages, page_size, head_dim_ckv] and [pages, page_size, head_dim_kpe].
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len
        As in `append_paged_kv_cache`.

    Raises
    ------
    TypeError, ValueError
        As `append_paged_kv_cache`.
    """
    op = "append_paged_mla_kv_cache"
    scalars = (op, 9)
    tensors = (append_ckv, append_kpe, ckv_cache, kpe_cache, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)  # fmt: skip
    if _append_again(scalars, tensors):
        return
    sources, caches = [], []
    for arg, x in (("append_ckv", append_ckv), ("append_kpe", append_kpe)):
        v = view(x, op, arg)
        check_ndim(op, arg, v, 2)
        sources.append(_with_head_axis(v, 1))
    for arg, x in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        v = view(x, op, arg)
        check_ndim(op, arg, v, 3)
        caches.append(_with_head_axis(v, 2))
    _append(
        scalars, tensors, op, ("append_ckv", "append_kpe"), (sources[0], sources[1]), ("ckv_cache", "kpe_cache"), (caches[0], caches[1]),
        1, 2, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len,
    )  # fmt: skip


def _with_head_axis(x: TensorView, axis: int) -> TensorView:
    shape, strides = tuple(x.shape), tuple(x.strides)
    return TensorView(
        x.obj,
        x.ptr,
        (*shape[:axis], 1, *shape[axis:]),
        (*strides[:axis], 0, *strides[axis:]),
        x.dtype,
        x.device,
        x.framework,
    )


def _index(op: str, arg: str, x: Any) -> TensorView:
    v = view(x, op, arg)
    check_dtype(op, arg, v, _INTEGERS)
    check_ndim(op, arg, v, 1)
    check_last_dim_contiguous(op, arg, v)
    return v


def _batch(op: str, arg: str, indptr: TensorView) -> int:
    if not indptr.shape[0]:
        fail(op, arg, "is empty", 0, "batch + 1 entries")
    return indptr.shape[0] - 1


def _append_again(scalars: tuple[str, int], tensors: tuple[Any, ...]) -> bool:
    """Whether this append is like one before; if so it is launched."""
    call = _append_calls.find(scalars, tensors)
    if call is None:
        return False
    if len(tensors) == 9:
        key, value, key_cache, value_cache, batch_indices, positions, kv_indices, kv_indptr, _ = map(call.ptr, tensors)
    else:  # keys and values in one tensor
        key, value, key_cache, batch_indices, positions, kv_indices, kv_indptr, _ = map(call.ptr, tensors)
        value_cache = key_cache + call.offset
    if (key | value | key_cache | value_cache) & 15:
        return False
    call.launch(
        call.stream(call.device), key, value, key_cache, value_cache, batch_indices, positions, kv_indices, kv_indptr
    )
    return True


def _append(
    scalars: tuple[str, int],
    tensors: tuple[Any, ...],
    op: str,
    names: tuple[str, str],
    sources: tuple[TensorView, TensorView],
    cache_names: tuple[str, str],
    caches: tuple[TensorView, TensorView],
    slot_axis: int,
    head_axis: int,
    batch_indices_: Any,
    positions_: Any,
    kv_indices_: Any,
    kv_indptr_: Any,
    kv_last_page_len_: Any,
) -> None:
    key, value = sources
    key_cache, value_cache = caches
    nnz, heads = key.shape[0], key.shape[1]
    num_pages, page_size = key_cache.shape[0], key_cache.shape[slot_axis]
    device = key.device
    for i in (0, 1):
        source, cache = sources[i], caches[i]
        check_same_dtype(op, names[i], source, cache_names[i], cache)
        if source.shape[0] != nnz or source.shape[1] != heads:
            check_shape(op, names[i], source, (nnz, heads, None))
        wanted: list[int | None] = [num_pages, None, None, source.shape[2]]
        wanted[slot_axis], wanted[head_axis] = page_size, heads
        check_shape(op, cache_names[i], cache, tuple(wanted))
        check_last_dim_contiguous(op, names[i], source)
        check_last_dim_contiguous(op, cache_names[i], cache)
        if source.device != device or cache.device != device:
            check_same_device(op, {names[0]: key, names[1]: value, cache_names[i]: cache})
    if not page_size:
        fail(op, cache_names[0], "has pages of no tokens", 0, "page_size 1 or more")
    batch_indices, positions = _index(op, "batch_indices", batch_indices_), _index(op, "positions", positions_)
    kv_indices, kv_indptr = _index(op, "kv_indices", kv_indices_), _index(op, "kv_indptr", kv_indptr_)
    last_page_len = _index(op, "kv_last_page_len", kv_last_page_len_)
    check_shape(op, "batch_indices", batch_indices, (nnz,))
    check_shape(op, "positions", positions, (nnz,))
    batch = _batch(op, "kv_indptr", kv_indptr)
    check_shape(op, "kv_last_page_len", last_page_len, (batch,))
    if not (batch_indices.device == positions.device == kv_indices.device == kv_indptr.device == device):
        indices = {
            "batch_indices": batch_indices,
            "positions": positions,
            "kv_indices": kv_indices,
            "kv_indptr": kv_indptr,
        }
        check_same_device(op, {names[0]: key, **indices})
    if not (nnz and heads and (key.shape[2] or value.shape[2])):
        return
    cache_strides = [(c.strides[0], c.strides[slot_axis], c.strides[head_axis]) for c in caches]
    if device < 0:
        from pyinfer.cpu import page as cpu

        index_arrays = [as_numpy(x) for x in (batch_indices, positions, kv_indices, kv_indptr)]
        batch_array, position_array, page_array, indptr_array = index_arrays
        what, token, page_of, slot_of = cpu.locate(
            batch_array, position_array, page_array, indptr_array, page_size, num_pages
        )
        if what != cpu.OK:
            _fail_token(op, what, token, index_arrays, batch, page_size, num_pages)
        for source, cache, cache_stride in zip(sources, caches, cache_strides, strict=True):
            cpu.append(source, cache, cache_stride, page_of, slot_of)
        return
    size = key.dtype.itemsize
    strides = [s * size for s in (*key.strides[:2], *value.strides[:2], *cache_strides[0], *cache_strides[1])]
    bits = (key.shape[2] | value.shape[2]) * size | key.ptr | value.ptr | key_cache.ptr | value_cache.ptr
    for s in strides:
        bits |= s
    access = vector_length(1, bits)
    key_chunks, value_chunks = key.shape[2] * size // access, value.shape[2] * size // access
    kernel, has_pdl, per_block = _append_kernel(device, access, heads, key_chunks, value_chunks)
    parts = -(-heads * max(key_chunks, value_chunks) // per_block)
    wide = (
        (batch_indices.dtype is INT64)
        | (positions.dtype is INT64) << 1
        | (kv_indices.dtype is INT64) << 2
        | (kv_indptr.dtype is INT64) << 3
    )
    values = (
        key.ptr, value.ptr, key_cache.ptr, value_cache.ptr, batch_indices.ptr, positions.ptr, kv_indices.ptr, kv_indptr.ptr, *strides,
        kv_indices.shape[0], num_pages, batch, page_size, heads, parts, wide,
    )  # fmt: skip
    aligned = not (key.ptr | value.ptr | key_cache.ptr | value_cache.ptr) & 15
    offset = value_cache.ptr - key_cache.ptr
    _append_calls.launch(scalars, tensors, key, kernel, nnz * parts, values, 8, has_pdl, aligned, offset=offset)


def _fail_token(op: str, what: int, token: int, arrays: list[Any], batch: int, page_size: int, num_pages: int) -> None:
    from pyinfer.cpu import page as cpu

    batch_indices, positions, kv_indices, kv_indptr = arrays
    request, position = int(batch_indices[token]), int(positions[token])
    if what == cpu.BAD_REQUEST:
        fail(op, "batch_indices", f"names no request (token {token})", request, f"less than {batch}")
    pages = int(kv_indptr[request + 1]) - int(kv_indptr[request])
    if what == cpu.BAD_POSITION:
        fix = "The page table must already count the appended tokens."
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
def _kernel(device: int, name: str) -> tuple[Kernel, bool]:
    """Kernel, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit import page

    spec = page.gen_batch_positions() if name == "batch_positions" else page.gen_seq_lens()
    return spec.build_and_load(device), pdl_supported(device)


@functools.cache
def _append_kernel(
    device: int, access: int, heads: int, key_chunks: int, value_chunks: int
) -> tuple[Kernel, bool, int]:
    """Kernel, whether it was built for programmatic dependent launch, chunks per block."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import append_config, gen_append

    block, unroll = append_config(heads * max(key_chunks, value_chunks))
    kernel = gen_append(access, heads, key_chunks, value_chunks).build_and_load(device)
    return kernel, pdl_supported(device), block * unroll


attach(__name__)  # what torch.compile traces in the place of these functions
