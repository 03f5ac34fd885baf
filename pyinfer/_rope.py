"""Rotary position embedding: checks and launches behind the functions of `pyinfer.rope`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import MISS, Calls
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
from pyinfer.core.rows import vector_length
from pyinfer.core.tensor import TensorView, as_numpy, empty, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_INTEGERS = (INT32, INT64)
_MAX_ROTARY_DIM = 512  # the table of frequencies is a kernel parameter, of which there are 4 KiB
MANY_TOKENS = 2048  # from here on kernels take several heads a thread (`jit.rope.rope_config`)

_calls = Calls()


def check_heads(op: str, names: tuple[str, str], q: TensorView, k: TensorView, ndim: int) -> None:
    for name, x in zip(names, (q, k), strict=True):
        check_ndim(op, name, x, ndim)
        check_dtype(op, name, x, _DTYPES)
        check_last_dim_contiguous(op, name, x)
    check_same_dtype(op, names[1], k, names[0], q)
    if k.shape[0] != q.shape[0]:
        fail(op, names[1], f"has another number of rows than {names[0]}", k.shape[0], q.shape[0])
    if ndim == 3 and k.shape[2] != q.shape[2]:
        fail(op, names[1], f"has another head_dim than {names[0]}", k.shape[2], q.shape[2])
    if k.device != q.device:
        check_same_device(op, {names[0]: q, names[1]: k})


def check_indices(op: str, arg: str, x: TensorView, n: int, q: TensorView) -> None:
    check_dtype(op, arg, x, _INTEGERS)
    check_shape(op, arg, x, (n,))
    check_last_dim_contiguous(op, arg, x)
    if x.device != q.device:
        check_same_device(op, {"q": q, arg: x})


def check_rotary(op: str, arg: str, rotary_dim: int, head_dim: int) -> None:
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > min(head_dim, _MAX_ROTARY_DIM):
        fail(
            op,
            arg,
            "cannot be rotated",
            rotary_dim,
            f"an even number from 2 to {min(head_dim, _MAX_ROTARY_DIM)} (head_dim {head_dim})",
        )


def check_table(op: str, cache: TensorView, other_arg: str, other: TensorView) -> None:
    """A table of cosines and sines: float32 [max_position, rotary_dim], on the device of `other`."""
    if cache.dtype is not FLOAT32:  # ValueError, as users of FlashInfer expect
        fail(
            op,
            "cos_sin_cache",
            "has the wrong dtype",
            cache.dtype.name,
            "float32",
            "Keep the cache in float32: angles need it.",
        )
    check_ndim(op, "cos_sin_cache", cache, 2)
    check_last_dim_contiguous(op, "cos_sin_cache", cache)
    if cache.device != other.device:
        check_same_device(op, {other_arg: other, "cos_sin_cache": cache})


def _check_scales(op: str, scales: tuple[float, ...]) -> None:
    if not scales[0] > 0:
        fail(op, "rope_scale", "is not positive", scales[0], "a number above 0")
    if not scales[1] > 0:
        fail(op, "rope_theta", "is not positive", scales[1], "a number above 0")
    if len(scales) > 2:
        if scales[2] == scales[3]:
            fail(op, "high_freq_factor", "equals low_freq_factor", scales[3], "two different numbers")
        if not scales[4] > 0:
            fail(op, "old_context_len", "is not positive", scales[4], "the length the model was trained with")


def _outputs(q: TensorView, k: TensorView, in_place: bool) -> tuple[Any, Any, TensorView, TensorView]:
    if in_place:
        return None, None, q, k
    q_out, k_out = empty(q, q.shape), empty(k, k.shape)
    return q_out, k_out, view(q_out), view(k_out)


def rope_pos_ids(
    op: str,
    q_: Any,
    k_: Any,
    pos_ids: Any,
    rotary_dim: int | None,
    interleave: bool,
    scales: tuple[float, ...],
    in_place: bool,
    enable_pdl: bool | None,
) -> Any:
    key = ("pos_ids", in_place, rotary_dim, interleave, scales, enable_pdl is not False)
    known = _calls.run(key, (q_, k_, pos_ids))
    if known is not MISS:
        return known
    q, k, positions = view(q_, op, "q"), view(k_, op, "k"), view(pos_ids, op, "pos_ids")
    check_heads(op, ("q", "k"), q, k, 3)
    check_indices(op, "pos_ids", positions, q.shape[0], q)
    rotary_dim = q.shape[2] if rotary_dim is None else int(rotary_dim)
    check_rotary(op, "rotary_dim", rotary_dim, q.shape[2])
    _check_scales(op, scales)
    q_obj, k_obj, q_out, k_out = _outputs(q, k, in_place)
    if q.shape[0]:
        if q.device < 0:
            _run_cpu(q, k, q_out, k_out, as_numpy(positions), rotary_dim, interleave, scales, in_place)
        else:
            table = (_frequency_bytes(rotary_dim, *scales),)
            wide = positions.dtype is INT64
            _launch(
                key, (q_, k_, pos_ids), (positions.ptr,), q, k, q_out, k_out, rotary_dim, interleave, in_place, wide, table, (), 0
            )  # fmt: skip
    return None if in_place else (q_obj, k_obj)


def rope_indptr(
    op: str,
    q_: Any,
    k_: Any,
    indptr_: Any,
    offsets_: Any,
    rotary_dim: int | None,
    interleave: bool,
    scales: tuple[float, ...],
    in_place: bool,
    enable_pdl: bool | None,
) -> Any:
    key = ("indptr", in_place, rotary_dim, interleave, scales, enable_pdl is not False)
    known = _calls.run(key, (q_, k_, indptr_, offsets_))
    if known is not MISS:
        return known
    q, k, indptr, offsets = (
        view(q_, op, "q"),
        view(k_, op, "k"),
        view(indptr_, op, "indptr"),
        view(offsets_, op, "offsets"),
    )
    check_heads(op, ("q", "k"), q, k, 3)
    check_ndim(op, "indptr", indptr, 1)
    if not indptr.shape[0]:
        fail(op, "indptr", "is empty", 0, "batch + 1 entries")
    requests = indptr.shape[0] - 1
    check_indices(op, "indptr", indptr, requests + 1, q)
    check_indices(op, "offsets", offsets, requests, q)
    check_same_dtype(op, "offsets", offsets, "indptr", indptr)
    rotary_dim = q.shape[2] if rotary_dim is None else int(rotary_dim)
    check_rotary(op, "rotary_dim", rotary_dim, q.shape[2])
    _check_scales(op, scales)
    q_obj, k_obj, q_out, k_out = _outputs(q, k, in_place)
    if q.shape[0]:
        if q.device < 0:
            from pyinfer.cpu.rope import positions_of_rows

            rows = as_numpy(indptr)
            if (rows[1:] < rows[:-1]).any():
                fail(op, "indptr", "is not monotone", rows.tolist(), "non-decreasing row numbers")
            positions = positions_of_rows(rows, as_numpy(offsets), q.shape[0])
            _run_cpu(q, k, q_out, k_out, positions, rotary_dim, interleave, scales, in_place)
        else:
            table = (_frequency_bytes(rotary_dim, *scales),)
            wide, indices = indptr.dtype is INT64, (indptr.ptr, offsets.ptr)
            _launch(
                key, (q_, k_, indptr_, offsets_), indices, q, k, q_out, k_out, rotary_dim, interleave, in_place, wide, table, (requests,), 0
            )  # fmt: skip
    return None if in_place else (q_obj, k_obj)


def rope_cached(
    op: str,
    positions_: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool,
    in_place: bool,
    enable_pdl: bool | None,
) -> Any:
    scalars = ("cache", in_place, head_size, is_neox, enable_pdl is not False)
    known = _calls.run(scalars, (query, key, positions_, cos_sin_cache))
    if known is not MISS:
        return known
    positions, q, k = view(positions_, op, "positions"), view(query, op, "query"), view(key, op, "key")
    cache = view(cos_sin_cache, op, "cos_sin_cache")
    check_heads(op, ("query", "key"), q, k, 2)
    check_indices(op, "positions", positions, q.shape[0], q)
    check_table(op, cache, "query", q)
    head_size = int(head_size)
    if head_size < 1:
        fail(op, "head_size", "is too small", head_size, "1 or more")
    for name, x in (("query", q), ("key", k)):
        if x.shape[1] % head_size:
            fail(
                op, name, "does not divide into heads", f"{x.shape[1]} columns", f"a multiple of head_size {head_size}"
            )
    rotary_dim = cache.shape[1]
    check_rotary(op, "cos_sin_cache (second axis)", rotary_dim, head_size)
    q_obj, k_obj, q_out, k_out = _outputs(q, k, in_place)
    if q.shape[0]:
        q, k, q_out, k_out = (_by_heads(x, head_size) for x in (q, k, q_out, k_out))
        if q.device < 0:
            from pyinfer.cpu import rope as cpu

            where, limit = as_numpy(positions), cache.shape[0]
            if int(where.min()) < 0 or int(where.max()) >= limit:
                bad = int(where.min()) if int(where.min()) < 0 else int(where.max())
                fail(op, "positions", "lies outside cos_sin_cache", bad, f"0 to {limit - 1}")
            cpu.rope(
                q, k, q_out, k_out, where, cos_sin_cache=as_numpy(cache), interleave=not is_neox, in_place=in_place
            )
        else:
            bits = cache.ptr | (cache.strides[0] | rotary_dim // 2) * 4
            wide, indices, table = (
                positions.dtype is INT64,
                (cache.ptr, positions.ptr),
                (cache.strides[0], cache.shape[0]),
            )
            _launch(
                scalars, (query, key, positions_, cos_sin_cache), indices, q, k, q_out, k_out, rotary_dim, not is_neox, in_place, wide, table, (), bits
            )  # fmt: skip
    return None if in_place else (q_obj, k_obj)


def _by_heads(x: TensorView, head_size: int) -> TensorView:
    """[rows, heads * head_size] as [rows, heads, head_size]."""
    return TensorView(
        x.obj,
        x.ptr,
        (x.shape[0], x.shape[1] // head_size, head_size),
        (x.strides[0], head_size, 1),
        x.dtype,
        x.device,
        x.framework,
    )


def _run_cpu(
    q: TensorView,
    k: TensorView,
    q_out: TensorView,
    k_out: TensorView,
    positions: Any,
    rotary_dim: int,
    interleave: bool,
    scales: tuple[float, ...],
    in_place: bool,
) -> None:
    from pyinfer.cpu import rope as cpu
    from pyinfer.jit.rope import frequency_table

    cpu.rope(
        q,
        k,
        q_out,
        k_out,
        positions,
        frequency=frequency_table(rotary_dim, *scales),
        interleave=bool(interleave),
        in_place=in_place,
    )


def _frequency_bytes(*key: float) -> bytes:
    from pyinfer.jit.rope import frequency_bytes

    return frequency_bytes(*key)


def _launch(
    key: tuple[Any, ...],
    tensors: tuple[Any, ...],
    indices: tuple[int, ...],
    q: TensorView,
    k: TensorView,
    q_out: TensorView,
    k_out: TensorView,
    rotary_dim: int,
    interleave: bool,
    in_place: bool,
    wide: bool,
    table: tuple[Any, ...],
    last: tuple[Any, ...],
    cache_bits: int,
) -> None:
    """`key`, `tensors`: what `Calls.run` will be asked with. `indices`: the addresses behind q's and k's; `table`: the fields that follow; `last`: the last."""
    tokens, q_heads, head_dim = q.shape
    num_heads = q_heads + k.shape[1]
    if not num_heads:
        return
    tail = 0 if in_place else head_dim - rotary_dim
    size = q.dtype.itemsize
    strides = (*q.strides[:2], *k.strides[:2], *q_out.strides[:2], *k_out.strides[:2])
    bits = rotary_dim // 2 | tail
    for s in strides:
        bits |= s
    addresses = q.ptr | k.ptr | q_out.ptr | k_out.ptr
    vec = 1 if cache_bits & 15 else vector_length(size, addresses | bits * size)
    kernel, heads_per_block, has_pdl = _rope_kernel(
        q.device, key[0], q.dtype.name, rotary_dim, bool(interleave), num_heads, vec, tokens >= MANY_TOKENS
    )
    parts = -(-num_heads // heads_per_block)
    pointers = (q.ptr, k.ptr, q_out.ptr, k_out.ptr, *indices)
    values = (*pointers, *table, *strides, q_heads, num_heads, parts, tail, wide, *last)
    aligned = not (addresses | (indices[0] if key[0] == "cache" else 0)) & 15
    outputs = () if in_place else tuple((view(x).shape, q.dtype) for x in tensors[:2])
    given, count = len(tensors), len(pointers)
    targets = (0, 1) if in_place else (given, given + 1)
    behind = (3, 2) if key[0] == "cache" else range(2, given)  # the table of angles comes first
    recipe = tuple([(i, 0) for i in (0, 1, *targets, *behind)])
    wants = 5 if key[0] == "cache" else 4
    _calls.launch(
        key, tensors, q, kernel, tokens * parts, values, count, has_pdl and key[-1], aligned, outputs, recipe, wants
    )


@functools.cache
def _rope_kernel(
    device: int, mode: str, dtype: str, rotary_dim: int, interleave: bool, num_heads: int, vec: int, many: bool
) -> tuple[Kernel, int, bool]:
    """Kernel, heads per block, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.rope import gen_rope, rope_config

    config = rope_config(rotary_dim // 2 // vec, num_heads, MANY_TOKENS if many else 1)
    spec = gen_rope(mode, dtype, rotary_dim, interleave, num_heads, vec, config)
    return spec.build_and_load(device), config.heads * config.unroll, pdl_supported(device)
