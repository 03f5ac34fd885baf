"""Paged KV cache upkeep on the CPU."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import move, threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.storage import flat

_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bits are moved, whatever they mean

OK, BAD_REQUEST, BAD_POSITION, BAD_PAGE = 0, 1, 2, 3


@kernel
def _locate(batch_indices, positions, kv_indices, kv_indptr, page_size, num_pages, page_of, slot_of):
    """Page and slot of every token (page -1: leave it out). Returns (OK or what is wrong, the first token it is wrong with)."""
    batch = kv_indptr.shape[0] - 1
    for t in range(batch_indices.shape[0]):
        request, position = batch_indices[t], positions[t]
        if request < 0 or position < 0:
            page_of[t] = -1
            continue
        if request >= batch:
            return BAD_REQUEST, t
        entry = kv_indptr[request] + position // page_size
        if entry >= kv_indptr[request + 1] or entry >= kv_indices.shape[0] or entry < 0:
            return BAD_POSITION, t
        page = kv_indices[entry]
        if page < 0 or page >= num_pages:
            return BAD_PAGE, t
        page_of[t] = page
        slot_of[t] = position % page_size
    return OK, 0


@kernel
def _append(begin, end, page_of, slot_of, heads, source, s0, s_layout, cache, c0, c_layout):
    # s_layout: (dim, stride_n, stride_h); c_layout: (stride_page, stride_slot, stride_head)
    dim, stride_n, stride_h = s_layout
    stride_page, stride_slot, stride_head = c_layout
    for t in range(begin, end):
        if page_of[t] < 0:
            continue
        to = c0 + page_of[t] * stride_page + slot_of[t] * stride_slot
        at = s0 + t * stride_n
        for h in range(heads):
            row = source[at + h * stride_h : at + h * stride_h + dim]
            target = cache[to + h * stride_head : to + h * stride_head + dim]
            for j in range(dim):
                target[j] = row[j]


def locate(
    batch_indices: np.ndarray,
    positions: np.ndarray,
    kv_indices: np.ndarray,
    kv_indptr: np.ndarray,
    page_size: int,
    num_pages: int,
) -> tuple[int, int, np.ndarray, np.ndarray]:
    """(what is wrong or OK, with which token, page of every token or -1, slot of every token)."""
    page_of, slot_of = np.empty(len(batch_indices), np.int64), np.zeros(len(batch_indices), np.int64)
    arrays = (a.astype(np.int64, copy=False) for a in (batch_indices, positions, kv_indices, kv_indptr))
    what, token = _locate(*arrays, page_size, num_pages, page_of, slot_of)
    return what, token, page_of, slot_of


def append(
    source: TensorView, cache: TensorView, cache_strides: tuple[int, int, int], page_of: np.ndarray, slot_of: np.ndarray
) -> None:
    """Copy source [tokens, heads, dim] into the cache; cache_strides are those of (page, slot, head) in elements."""
    carrier = _CARRIERS[source.dtype.itemsize]
    _, heads, dim = source.shape
    grain = max(1, (1 << 15) // max(1, heads * dim * source.dtype.itemsize))
    layout = (dim, source.strides[0], source.strides[1])
    threads.run(
        _append,
        len(page_of),
        page_of,
        slot_of,
        heads,
        *flat(source, carrier),
        layout,
        *flat(cache, carrier),
        cache_strides,
        grain=grain,
    )


def cache_bases(cache: TensorView, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Where tokens begin in a cache [pages, page_size, heads, dim], in elements from its first; -1: nowhere. `places`: page (or -1) and slot of every token."""
    page_of, slot_of = places
    return np.where(page_of < 0, -1, page_of * cache.strides[0] + slot_of * cache.strides[1])


def append_quantized(
    source: TensorView, cache: TensorView, places: tuple[np.ndarray, np.ndarray], scales: np.ndarray
) -> None:
    """Source [tokens, heads, dim] divided by a scale (one, or one a head) and rounded into a cache [pages, page_size, heads, dim]."""
    one = np.float32(1.0)
    move.rounded(source, cache, move.row_bases(source), cache_bases(cache, places), cache.strides[2], one / scales)


def gather(
    target: TensorView, cache: TensorView, places: tuple[np.ndarray, np.ndarray], scales: np.ndarray | None
) -> None:
    """What lies in a cache [pages, page_size, heads, dim] to target [tokens, heads, dim], zeros where a token lies nowhere; times `scales` unless None."""
    bases, rows = cache_bases(cache, places), move.row_bases(target)
    if scales is None:
        move.bits(cache, target, bases, rows)
    else:
        move.rounded(cache, target, bases, rows, target.strides[1], scales)


def doubtful_page(source_pages: np.ndarray, target_pages: np.ndarray, same: bool) -> int:
    """A page that is a target twice, or (`same`: of one cache) source and target; -1 if there is none."""
    found, counts = np.unique(target_pages, return_counts=True)
    twice = found[counts > 1]
    if not twice.size and same:
        twice = np.intersect1d(source_pages, target_pages)
    return int(twice[0]) if twice.size else -1


def vector_offsets(
    arrays: list[np.ndarray], stride_block: int, stride_n: int, block_size: int
) -> tuple[int, str, int, str] | None:
    """Fill offsets, request by request; `arrays`: indices, indptr, offsets, out_indptr, kv_lens.

    If it cannot be: (request, what is wrong, got, wanted), and nothing is written.
    """
    indices, indptr, offsets, out_indptr, kv_lens = arrays
    made = []
    for b, length in enumerate(kv_lens.tolist()):
        blocks, begin = indices[indptr[b] : indptr[b + 1]].astype(np.int64), int(out_indptr[b])
        if length < 0 or length > len(blocks) * block_size:
            return b, "does not fit the request's blocks", length, f"0 to {len(blocks) * block_size}"
        if begin < 0 or begin + length > len(offsets):
            return b, "goes beyond out_offsets", begin + length, f"{len(offsets)} or less"
        at = np.arange(length)
        found = blocks[at // block_size] * stride_block + at % block_size * stride_n
        if length and int(np.abs(found).max()) >= 1 << 31:
            return b, "gives an offset beyond 32 bits", int(np.abs(found).max()), f"less than {1 << 31}"
        made.append((begin, found))
    for begin, found in made:
        offsets[begin : begin + len(found)] = found
    return None


def batch_indices_positions(
    append_indptr: np.ndarray, seq_lens: np.ndarray, batch_indices: np.ndarray, positions: np.ndarray
) -> None:
    """Fill both outputs: request and position of every appended row, -1 for rows of no request."""
    batch_indices.fill(-1)
    positions.fill(-1)
    lengths = np.diff(append_indptr)
    begin, end = int(append_indptr[0]), int(append_indptr[-1])
    batch_indices[begin:end] = np.repeat(np.arange(len(lengths)), lengths)
    positions[begin:end] = np.arange(begin, end) + np.repeat(seq_lens - append_indptr[1:], lengths)
