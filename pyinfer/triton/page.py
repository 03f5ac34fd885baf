"""Upkeep of a paged KV cache in Triton."""

from __future__ import annotations

from typing import Any

from pyinfer._attention import check_layout, paged_views
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
from pyinfer.core.tensor import TensorView
from pyinfer.triton._launch import kernels, next_power_of_2, on_device, torch_view

__all__ = ["append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"]


def get_batch_indices_positions(
    append_indptr: Any, seq_lens: Any, nnz: int, batch_indices: Any = None, positions: Any = None
) -> tuple[Any, Any]:
    """`pyinfer.get_batch_indices_positions` in Triton."""
    op = "triton.page.get_batch_indices_positions"
    module = kernels(op)
    indptr, lengths = _index(op, "append_indptr", append_indptr), _index(op, "seq_lens", seq_lens)
    batch = _batch(op, "append_indptr", indptr)
    check_shape(op, "seq_lens", lengths, (batch,))
    if nnz < 0:
        fail(op, "nnz", "is negative", nnz, "the number of rows")
    views = {"append_indptr": indptr, "seq_lens": lengths}
    outputs = []
    for arg, given in (("batch_indices", batch_indices), ("positions", positions)):
        obj = indptr.obj.new_empty((nnz,), dtype=_int32()) if given is None else given
        views[arg] = v = torch_view(op, arg, obj)
        check_dtype(op, arg, v, (INT32,))
        check_shape(op, arg, v, (nnz,))
        check_last_dim_contiguous(op, arg, v)
        outputs.append(obj)
    check_same_device(op, views)
    if nnz:
        with on_device(indptr):
            module.batch_positions[(batch + 1,)](indptr.obj, lengths.obj, *outputs, batch, nnz, BLOCK=128, num_warps=4)
    return outputs[0], outputs[1]


def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """`pyinfer.get_seq_lens` in Triton."""
    op = "triton.page.get_seq_lens"
    module = kernels(op)
    indptr, last = _index(op, "kv_indptr", kv_indptr), _index(op, "kv_last_page_len", kv_last_page_len)
    batch = _batch(op, "kv_indptr", indptr)
    check_shape(op, "kv_last_page_len", last, (batch,))
    check_same_device(op, {"kv_indptr": indptr, "kv_last_page_len": last})
    if page_size < 1:
        fail(op, "page_size", "is too small", page_size, "1 or more")
    out = indptr.obj.new_empty((batch,), dtype=_int32())
    if batch:
        with on_device(indptr):
            module.seq_lens[(-(-batch // 128),)](indptr.obj, last.obj, out, page_size, batch, BLOCK=128, num_warps=4)
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
    """`pyinfer.append_paged_kv_cache` in Triton: tokens without a place are left out."""
    op = "triton.page.append_paged_kv_cache"
    module = kernels(op)
    check_layout(op, kv_layout)
    k, v = torch_view(op, "append_key", append_key), torch_view(op, "append_value", append_value)
    check_ndim(op, "append_key", k, 3)
    check_ndim(op, "append_value", v, 3)
    for cache in paged_kv_cache if isinstance(paged_kv_cache, tuple) else (paged_kv_cache,):
        torch_view(op, "paged_kv_cache", cache)
    k_cache, v_cache = paged_views(op, paged_kv_cache, kv_layout, 1)
    slot_axis, head_axis = (1, 2) if kv_layout == "NHD" else (2, 1)
    nnz, heads, k_dim = k.shape
    v_dim = v.shape[2]
    num_pages, page_size = k_cache.shape[0], k_cache.shape[slot_axis]
    check_shape(op, "append_value", v, (nnz, heads, None))
    strides = []
    for arg, x, cache, dim in (("key", k, k_cache, k_dim), ("value", v, v_cache, v_dim)):
        name = f"paged_kv_cache ({arg})"
        wanted: list[int | None] = [num_pages, None, None, dim]
        wanted[slot_axis], wanted[head_axis] = page_size, heads
        check_shape(op, name, cache, tuple(wanted))
        check_same_dtype(op, f"append_{arg}", x, name, cache)
        check_last_dim_contiguous(op, f"append_{arg}", x)
        check_last_dim_contiguous(op, name, cache)
        strides.append((cache.strides[0], cache.strides[slot_axis], cache.strides[head_axis]))
    if not page_size:
        fail(op, "paged_kv_cache", "has pages of no tokens", 0, "page_size 1 or more")
    given = {"batch_indices": batch_indices, "positions": positions, "kv_indices": kv_indices, "kv_indptr": kv_indptr}
    index = {arg: _index(op, arg, x) for arg, x in given.items()}
    last = _index(op, "kv_last_page_len", kv_last_page_len)
    batch = _batch(op, "kv_indptr", index["kv_indptr"])
    check_shape(op, "batch_indices", index["batch_indices"], (nnz,))
    check_shape(op, "positions", index["positions"], (nnz,))
    check_shape(op, "kv_last_page_len", last, (batch,))
    check_same_device(op, {"append_key": k, "append_value": v, "cache (K)": k_cache, "cache (V)": v_cache, **index})
    most = max(k_dim, v_dim)
    if not (nnz and heads and most):
        return
    block = next_power_of_2(most)
    with on_device(k):
        module.append[(nnz, heads)](
            *[_bits(x) for x in (k, v, k_cache, v_cache)], *[x.obj for x in index.values()], *k.strides[:2], *v.strides[:2], *strides[0], *strides[1],
            index["kv_indices"].shape[0], num_pages, batch, page_size, k_dim, v_dim, BLOCK=block, num_warps=1,
        )  # fmt: skip


def _bits(x: TensorView) -> Any:
    """A torch tensor of integers over x's memory: nothing is converted on the way, so any dtype is copied as it is."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    first = x.obj.view(integers)
    offset = (x.ptr - first.data_ptr()) // x.dtype.itemsize  # v of a combined cache begins inside the tensor
    return first.as_strided(x.shape, x.strides, first.storage_offset() + offset)


def _int32() -> Any:
    import torch

    return torch.int32


def _index(op: str, arg: str, x: Any) -> TensorView:
    v = torch_view(op, arg, x)
    check_dtype(op, arg, v, (INT32, INT64))
    check_ndim(op, arg, v, 1)
    check_last_dim_contiguous(op, arg, v)
    return v


def _batch(op: str, arg: str, indptr: TensorView) -> int:
    if not indptr.shape[0]:
        fail(op, arg, "is empty", 0, "batch + 1 entries")
    return indptr.shape[0] - 1
