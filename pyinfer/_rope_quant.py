"""Rotary embedding with rounding to 8 bits, or with the append to a paged cache, in one launch: what `pyinfer.rope`'s functions of these names do."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer._page import Places, check_cache, check_places
from pyinfer._rope import check_indices, check_rotary, check_table
from pyinfer.core.calls import MISS, Calls, Source
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT64, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    fail,
    fail_type,
)
from pyinfer.core.rows import vector_length
from pyinfer.core.scales import FP8, fp8_dtype
from pyinfer.core.tensor import TensorView, as_numpy, empty, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

_HALVES = (FLOAT16, BFLOAT16)
_calls = Calls()


class Heads(NamedTuple):
    """A tensor [tokens, heads, dim] and its name in messages."""

    arg: str
    view: TensorView

    @property
    def dim(self) -> int:
        """Elements of a head."""
        return self.view.shape[2]


class Outputs(NamedTuple):
    """Where the results go. With `places` the keys' and values' are caches, with strides of (page, slot, head)."""

    q_rope: TensorView
    q_nope: TensorView | None
    k_rope: TensorView
    k_nope: TensorView | None
    v: TensorView | None
    places: Places | None


class Memory(NamedTuple):
    """What a call is remembered by.

    Attributes
    ----------
    scalars, known
        What `Calls.run` is asked with.
    roles
        A name for each of `known`.
    made, made_roles
        The outputs that the call allocated, and their names. Empty: none.
    remember
        Whether a later call can be answered.
    """

    scalars: tuple[Any, ...]
    known: tuple[Any, ...]
    roles: tuple[str, ...]
    made: tuple[Any, ...]
    made_roles: tuple[str, ...]
    remember: bool


def memory(
    scalars: tuple[Any, ...],
    roles: tuple[str, ...],
    tensors: tuple[Any, ...],
    output_roles: tuple[str, ...],
    given: tuple[Any, ...],
    made: list[Any],
) -> Memory:
    """`tensors`: one for each of `roles`, None where there is none. `given`: the outputs of the caller's, `made`: all outputs."""
    some = sum(g is not None for g in given)
    present = [(r, t) for r, t in zip(roles, tensors, strict=True) if t is not None]
    allocated = not some
    return Memory(
        scalars,
        tuple([t for _, t in present]),
        tuple([r for r, _ in present]),
        tuple(made) if allocated else (),
        output_roles if allocated else (),
        some in (0, len(given)),
    )


def split_heads(op: str, arg: str, x: Any, dtypes: tuple[DType, ...] = _HALVES, flat_ok: bool = False) -> Heads:
    """View [tokens, heads, dim], or with `flat_ok` also [tokens, dim] as one head."""
    v = view(x, op, arg)
    check_ndim(op, arg, v, (2, 3) if flat_ok else 3)
    check_dtype(op, arg, v, dtypes)
    check_last_dim_contiguous(op, arg, v)
    return Heads(arg, one_head(v) if len(v.shape) == 2 else v)


def one_head(v: TensorView) -> TensorView:
    """[tokens, dim] as [tokens, 1, dim]."""
    shape, strides = (v.shape[0], 1, v.shape[1]), (v.strides[0], 0, v.strides[1])
    return TensorView(v.obj, v.ptr, shape, strides, v.dtype, v.device, v.framework)


def part_of(v: TensorView, begin: int, end: int) -> TensorView:
    """Elements begin..end-1 of the last axis."""
    ptr = v.ptr + begin * v.dtype.itemsize
    return TensorView(v.obj, ptr, (*v.shape[:-1], end - begin), v.strides, v.dtype, v.device, v.framework)


def check_like(op: str, x: Heads, first: Heads, heads: int | None, dim: int | None = None) -> None:
    """Rows, device and dtype of `first`; so many heads and elements."""
    check_same_dtype(op, x.arg, x.view, first.arg, first.view)
    check_shape(op, x.arg, x.view, (first.view.shape[0], heads, dim))
    if x.view.device != first.view.device:
        check_same_device(op, {first.arg: first.view, x.arg: x.view})


def check_inputs(
    op: str, q_rope: Heads, k_rope: Heads, q_nope: Heads | None, k_nope: Heads | None, table: TensorView, pos_ids: Any
) -> TensorView:
    """The queries' and keys' parts and the table of angles agree; returns the view of pos_ids."""
    rotary_dim = q_rope.dim
    check_like(op, k_rope, q_rope, None, rotary_dim)
    if (q_nope is None) != (k_nope is None):
        missing, there = ("q_nope", "k_nope") if q_nope is None else ("k_nope", "q_nope")
        fail(op, missing, f"is missing where {there} is given", None, "both or neither")
    if q_nope is not None and k_nope is not None:
        check_like(op, q_nope, q_rope, q_rope.view.shape[1])
        check_like(op, k_nope, q_rope, k_rope.view.shape[1], q_nope.dim)
    check_table(op, table, q_rope.arg, q_rope.view)
    check_rotary(op, "cos_sin_cache (second axis)", table.shape[1], rotary_dim)
    if table.shape[1] != rotary_dim:
        fail(op, "cos_sin_cache", "has another rotary dimension", table.shape[1], f"{rotary_dim}, as {q_rope.arg} has")
    positions = view(pos_ids, op, "pos_ids")
    check_indices(op, "pos_ids", positions, q_rope.view.shape[0], q_rope.view)
    return positions


def rope_quantize(
    op: str,
    inputs: tuple[Any, Any, Any, Any],
    cos_sin_cache: Any,
    pos_ids: Any,
    is_neox: bool,
    quantize_dtype: Any,
    scales: tuple[float, float],
    outputs: tuple[Any, Any, Any, Any],
    enable_pdl: bool | None,
) -> tuple[Any, Any, Any, Any]:
    """`inputs` and `outputs`: q_rope, k_rope, q_nope, k_nope."""
    names = ("q_rope", "k_rope", "q_nope", "k_nope")
    present = tuple([x is not None for x in inputs])
    given = tuple([o is not None for o in outputs])
    wanted = None if quantize_dtype is None else str(quantize_dtype)
    scalars = ("quantize", is_neox, wanted, scales, enable_pdl is not False, present, given)
    tensors = (*inputs, cos_sin_cache, pos_ids, *outputs)
    result = _calls.run(scalars, tuple([x for x in tensors if x is not None]))
    if result is not MISS:
        return outputs if result is None else result
    mla = k_is_flat(op, inputs[1])
    flat = (False, mla, False, mla)
    q_rope, k_rope, q_nope, k_nope = (
        None if x is None else split_heads(op, name, x, flat_ok=f)
        for name, x, f in zip(names, inputs, flat, strict=True)
    )
    if q_rope is None or k_rope is None:
        fail_type(op, "q_rope" if q_rope is None else "k_rope", "is missing", None, "a tensor")
    table = view(cos_sin_cache, op, "cos_sin_cache")
    positions = check_inputs(op, q_rope, k_rope, q_nope, k_nope, table, pos_ids)
    views = [None if o is None else view(o, op, f"{name}_out") for name, o in zip(names, outputs, strict=True)]
    dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, *views)
    made: list[Any] = []
    targets: list[TensorView | None] = []
    for i, (name, source, own) in enumerate(zip(names, (q_rope, k_rope, q_nope, k_nope), views, strict=True)):
        like = q_rope if i in (0, 2) else k_rope
        shape = (*like.view.shape[:2], 0) if source is None else source.view.shape
        shape = (shape[0], shape[2]) if flat[i] else tuple(shape)
        if own is None:
            made.append(empty(q_rope.view, shape, dtype))
            own = view(made[-1])
        else:
            check_dtype(op, f"{name}_out", own, (dtype,))
            check_shape(op, f"{name}_out", own, shape)
            check_last_dim_contiguous(op, f"{name}_out", own)
            if own.device != q_rope.view.device:
                check_same_device(op, {"q_rope": q_rope.view, f"{name}_out": own})
            made.append(outputs[i])
        targets.append(None if source is None else one_head(own) if flat[i] else own)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out = targets
    assert q_rope_out is not None and k_rope_out is not None
    out = Outputs(q_rope_out, q_nope_out, k_rope_out, k_nope_out, None, None)
    out_roles = tuple([f"{name}_out" for name in names])
    m = memory(scalars, (*names, "table", "pos_ids", *out_roles), tensors, out_roles, outputs, made)
    roles = (*names, "q_rope_out", "q_nope_out", "k_rope_out", "k_nope_out")
    _launch(op, q_rope, k_rope, q_nope, k_nope, None, table, positions, out, is_neox, scales, enable_pdl, roles, m)
    return made[0], made[1], made[2], made[3]


def k_is_flat(op: str, k_rope: Any) -> bool:
    """Whether keys come without an axis of heads (multi-head latent attention)."""
    return len(view(k_rope, op, "k_rope").shape) == 2


def rope_quantize_append(
    op: str,
    inputs: tuple[Any, Any, Any, Any, Any],
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: Any,
    indices: tuple[Any, Any, Any, Any],
    is_neox: bool,
    quantize_dtype: Any,
    scales: tuple[float, float],
    page_size: int,
    kv_layout: str,
    outputs: tuple[Any, Any],
    enable_pdl: bool | None,
) -> tuple[Any, Any]:
    """`inputs`: q_rope, k_rope, q_nope, k_nope, v. `indices`: kv_indices, kv_indptr, batch_indices, positions. `outputs`: q_rope_out, q_nope_out."""
    if type(paged_kv_cache) is not tuple or len(paged_kv_cache) != 2:
        got = f"{type(paged_kv_cache).__name__} of {len(paged_kv_cache)}" if isinstance(paged_kv_cache, list | tuple) else type(paged_kv_cache).__name__  # fmt: skip
        fail_type(op, "paged_kv_cache", "is no pair", got, "a tuple (k_cache, v_cache), or (ckv_cache, kpe_cache)")
    present = tuple([x is not None for x in inputs])
    given = tuple([o is not None for o in outputs])
    wanted = None if quantize_dtype is None else str(quantize_dtype)
    scalars = ("append", is_neox, wanted, scales, page_size, kv_layout, enable_pdl is not False, present, given)
    tensors = (*inputs, cos_sin_cache, pos_ids, *paged_kv_cache, *indices, *outputs)
    result = _calls.run(scalars, tuple([x for x in tensors if x is not None]))
    if result is not MISS:
        return outputs if result is None else result
    mla = k_is_flat(op, inputs[1])
    names, flat = ("q_rope", "k_rope", "q_nope", "k_nope", "v"), (False, mla, False, mla, False)
    q_rope, k_rope, q_nope, k_nope, v = (
        None if x is None else split_heads(op, name, x, flat_ok=f)
        for name, x, f in zip(names, inputs, flat, strict=True)
    )
    if q_rope is None or k_rope is None:
        fail_type(op, "q_rope" if q_rope is None else "k_rope", "is missing", None, "a tensor")
    if mla and v is not None:
        fail(op, "v", "is given for keys without heads", tuple(v.view.shape), None, "Latent attention has no values.")
    if mla and k_nope is None:
        fail(op, "k_nope", "is missing for keys without heads", None, "the latent part [nnz, no_rope_dim]")
    if not mla and v is None:
        fail(op, "v", "is missing", None, "[nnz, num_kv_heads, head_dim]", "Only latent attention goes without.")
    table = view(cos_sin_cache, op, "cos_sin_cache")
    cache_positions = check_inputs(op, q_rope, k_rope, q_nope, k_nope, table, pos_ids)
    views = [None if o is None else view(o, op, f"{n}_out") for n, o in zip(("q_rope", "q_nope"), outputs, strict=True)]
    heads, rotary_dim, nope = k_rope.view.shape[1], k_rope.dim, 0 if k_nope is None else k_nope.dim
    if mla:
        ckv, kpe = (view(c, op, a) for c, a in zip(paged_kv_cache, ("ckv_cache", "kpe_cache"), strict=True))
        dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, *views, ckv)
        k_nope_cache = check_cache(op, "ckv_cache", ckv, "MLA", 1, nope, (dtype,))
        k_rope_cache = check_cache(op, "kpe_cache", kpe, "MLA", 1, rotary_dim, (dtype,))
        v_cache, first = None, k_rope_cache
        second: TensorView = k_nope_cache
    else:
        k_cache, v_view = (view(c, op, f"paged_kv_cache[{i}]") for i, c in enumerate(paged_kv_cache))
        dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, *views, k_cache)
        assert v is not None
        check_like(op, v, q_rope, heads)
        keys = check_cache(op, "paged_kv_cache[0]", k_cache, kv_layout, heads, rotary_dim + nope, (dtype,))
        v_cache = check_cache(op, "paged_kv_cache[1]", v_view, kv_layout, heads, v.dim, (dtype,))
        k_rope_cache = part_of(keys, 0, rotary_dim)
        k_nope_cache = part_of(keys, rotary_dim, rotary_dim + nope)
        first, second = keys, v_cache
    if second.shape[:2] != first.shape[:2]:
        fail(
            op,
            "paged_kv_cache[1]",
            "has other pages than paged_kv_cache[0]",
            tuple(second.shape[:2]),
            tuple(first.shape[:2]),
        )
    if first.shape[1] != page_size:
        fix = "Pass page_size as the cache has it."
        fail(op, "page_size", "is not the cache's", page_size, first.shape[1], fix)
    kv_indices, kv_indptr, batch_indices, positions = indices
    places = check_places(
        op, q_rope.arg, q_rope.view, batch_indices, positions, kv_indices, kv_indptr, None, first.shape[0], page_size
    )
    if first.device != q_rope.view.device or second.device != q_rope.view.device:
        check_same_device(op, {"q_rope": q_rope.view, "paged_kv_cache[0]": first, "paged_kv_cache[1]": second})
    made: list[Any] = []
    targets: list[TensorView] = []
    for name, source, own, obj in zip(("q_rope", "q_nope"), (q_rope, q_nope), views, outputs, strict=True):
        shape = (*q_rope.view.shape[:2], 0) if source is None else tuple(source.view.shape)
        if own is None:
            obj = empty(q_rope.view, shape, dtype)
            own = view(obj)
        else:
            check_dtype(op, f"{name}_out", own, (dtype,))
            check_shape(op, f"{name}_out", own, shape)
            check_last_dim_contiguous(op, f"{name}_out", own)
            if own.device != q_rope.view.device:
                check_same_device(op, {"q_rope": q_rope.view, f"{name}_out": own})
        made.append(obj)
        targets.append(own)
    out = Outputs(targets[0], targets[1] if q_nope is not None else None, k_rope_cache, k_nope_cache if k_nope is not None else None, v_cache, places)  # fmt: skip
    out_roles = ("q_rope_out", "q_nope_out")
    m = memory(
        scalars,
        (*names, "table", "pos_ids", "cache0", "cache1", *_INDICES, *out_roles),
        tensors,
        out_roles,
        outputs,
        made,
    )
    caches = ("cache1", "cache0", "") if mla else ("cache0", "cache0", "cache1")
    roles = (*names, *out_roles, *caches)
    _launch(op, q_rope, k_rope, q_nope, k_nope, v, table, cache_positions, out, is_neox, scales, enable_pdl, roles, m)
    return made[0], made[1]


def rope_append(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: Any,
    indices: tuple[Any, Any, Any, Any],
    is_neox: bool,
    kv_layout: str,
    q_out: Any,
    enable_pdl: bool | None,
) -> Any:
    """Nothing is quantised: queries to q_out (may be q), keys and values into the cache, in their own dtype."""
    from pyinfer._attention import check_layout, paged_views

    pair = type(paged_kv_cache) is tuple
    scalars = ("plain", is_neox, kv_layout, pair, enable_pdl is not False, q_out is not None)
    caches = paged_kv_cache if pair else (paged_kv_cache,)
    tensors = (q, k, v, cos_sin_cache, pos_ids, *caches, *indices, q_out)
    result = _calls.run(scalars, tensors if q_out is not None else tensors[:-1])
    if result is not MISS:
        return q_out if result is None else result
    dtypes = (*_HALVES, FLOAT32)
    q_all, k_all, values = (split_heads(op, n, x, dtypes) for n, x in (("q", q), ("k", k), ("v", v)))
    check_layout(op, kv_layout)
    table = view(cos_sin_cache, op, "cos_sin_cache")
    check_table(op, table, "q", q_all.view)
    rotary_dim, dim, heads = table.shape[1], q_all.dim, k_all.view.shape[1]
    check_rotary(op, "cos_sin_cache (second axis)", rotary_dim, dim)
    check_like(op, k_all, q_all, None, dim)
    check_like(op, values, q_all, heads)
    positions = view(pos_ids, op, "pos_ids")
    check_indices(op, "pos_ids", positions, q_all.view.shape[0], q_all.view)
    k_view, v_view = paged_views(op, paged_kv_cache, kv_layout, 1)
    dtype = (q_all.view.dtype,)
    keys = check_cache(op, "paged_kv_cache (K)", k_view, kv_layout, heads, dim, dtype)
    v_cache = check_cache(op, "paged_kv_cache (V)", v_view, kv_layout, heads, values.dim, dtype)
    if keys.shape[:2] != v_cache.shape[:2]:
        fail(
            op,
            "paged_kv_cache (V)",
            "has other pages than paged_kv_cache (K)",
            tuple(v_cache.shape[:2]),
            tuple(keys.shape[:2]),
        )
    kv_indices, kv_indptr, batch_indices, where = indices
    places = check_places(
        op, "q", q_all.view, batch_indices, where, kv_indices, kv_indptr, None, keys.shape[0], keys.shape[1]
    )
    if not keys.device == v_cache.device == q_all.view.device:
        check_same_device(op, {"q": q_all.view, "paged_kv_cache (K)": keys, "paged_kv_cache (V)": v_cache})
    obj = empty(q_all.view, q_all.view.shape) if q_out is None else q_out
    target = view(obj, op, "q_out")
    if q_out is not None:
        check_same_dtype(op, "q_out", target, "q", q_all.view)
        check_shape(op, "q_out", target, tuple(q_all.view.shape))
        check_last_dim_contiguous(op, "q_out", target)
        if target.device != q_all.view.device:
            check_same_device(op, {"q": q_all.view, "q_out": target})
    rest = dim > rotary_dim
    out = Outputs(
        part_of(target, 0, rotary_dim),
        part_of(target, rotary_dim, dim) if rest else None,
        part_of(keys, 0, rotary_dim),
        part_of(keys, rotary_dim, dim) if rest else None,
        v_cache,
        places,
    )
    cache_roles = ("cache0", "cache1") if pair else ("cache0",)
    all_roles = ("q", "k", "v", "table", "pos_ids", *cache_roles, *_INDICES, "q_out")
    m = memory(scalars, all_roles, tensors, ("q_out",), (q_out,), [obj])
    roles = ("q", "k", "q", "k", "v", "q_out", "q_out", "cache0", "cache0", "cache1" if pair else "cache0")
    _launch(
        op,
        Heads("q", part_of(q_all.view, 0, rotary_dim)),
        Heads("k", part_of(k_all.view, 0, rotary_dim)),
        Heads("q", part_of(q_all.view, rotary_dim, dim)) if rest else None,
        Heads("k", part_of(k_all.view, rotary_dim, dim)) if rest else None,
        values, table, positions, out, is_neox, (1.0, 1.0), enable_pdl, roles, m,
    )  # fmt: skip
    return obj


def _launch(
    op: str,
    q_rope: Heads,
    k_rope: Heads,
    q_nope: Heads | None,
    k_nope: Heads | None,
    v: Heads | None,
    table: TensorView,
    positions: TensorView,
    out: Outputs,
    is_neox: bool,
    scales: tuple[float, float],
    enable_pdl: bool | None,
    roles: tuple[str, ...],
    m: Memory,
) -> None:
    """`roles`: which of the call's tensors each input and output lies in."""
    for arg, scale in (("quant_scale_q", scales[0]), ("quant_scale_kv", scales[1])):
        if not 0.0 < scale < float("inf"):
            fail(op, arg, "is no scale", scale, "a positive, finite number")
    tokens = q_rope.view.shape[0]
    if not tokens:
        return
    if q_rope.view.device < 0:
        from pyinfer.cpu import rope as cpu

        where, limit = as_numpy(positions), table.shape[0]
        if int(where.min()) < 0 or int(where.max()) >= limit:
            bad = int(where.min()) if int(where.min()) < 0 else int(where.max())
            fail(op, "pos_ids", "lies outside cos_sin_cache", bad, f"0 to {limit - 1}")
        bases = None if out.places is None else out.places.bases(op)
        pairs = ((q_rope, out.q_rope, None), (k_rope, out.k_rope, bases))
        for (source, target, at), scale in zip(pairs, scales, strict=True):
            cpu.rope_rounded(source.view, target, where, as_numpy(table), not is_neox, scale, at)
        moves = (
            (q_nope, out.q_nope, None, scales[0]),
            (k_nope, out.k_nope, bases, scales[1]),
            (v, out.v, bases, scales[1]),
        )
        for source_or_none, target_or_none, at, scale in moves:
            if source_or_none is not None and target_or_none is not None:
                cpu.move_rounded(source_or_none.view, target_or_none, scale, at)
        return
    _launch_cuda(q_rope, k_rope, q_nope, k_nope, v, table, positions, out, is_neox, scales, enable_pdl, roles, m)


def _launch_cuda(
    q_rope: Heads,
    k_rope: Heads,
    q_nope: Heads | None,
    k_nope: Heads | None,
    v: Heads | None,
    table: TensorView,
    positions: TensorView,
    out: Outputs,
    is_neox: bool,
    scales: tuple[float, float],
    enable_pdl: bool | None,
    roles: tuple[str, ...],
    m: Memory,
) -> None:
    places, append = out.places, out.places is not None
    dtype, out_dtype = q_rope.view.dtype, out.q_rope.dtype
    inputs = [x if x is None else x.view for x in (q_rope, k_rope, q_nope, k_nope)] + ([v and v.view] if append else [])
    q_outs, k_outs = [out.q_rope, out.q_nope], [out.k_rope, out.k_nope] + ([out.v] if append else [])
    rotary_dim, nope = q_rope.dim, 0 if q_nope is None else q_nope.dim
    value = 0 if v is None or not append else v.dim
    ratio = dtype.itemsize // out_dtype.itemsize
    bits = (rotary_dim // 2 | nope | value) * dtype.itemsize
    for group, factor in ((inputs, 1), (q_outs, ratio), (k_outs, ratio)):
        for x in group:
            if x is not None:
                for s in x.strides[:-1]:
                    bits |= s * dtype.itemsize
                bits |= x.ptr * factor
    misaligned = (table.ptr | (table.strides[0] | rotary_dim // 2) * 4) & 15
    vec = 1 if misaligned else vector_length(dtype.itemsize, bits)
    in_place = out.q_nope is not None and q_nope is not None and out.q_nope.ptr == q_nope.view.ptr and ratio == 1
    q_heads, kv_heads = q_rope.view.shape[1], k_rope.view.shape[1]
    heads = (q_heads, kv_heads, 0 if in_place or q_nope is None else q_heads)
    kernel, has_pdl = _kernel(
        q_rope.view.device, dtype.name, out_dtype.name, rotary_dim, nope, not is_neox, append, value, vec
    )
    from pyinfer.jit.rope import rope_quantize_parts

    parts = rope_quantize_parts(heads, rotary_dim // 2, nope, value, vec)
    tensors = [*inputs, *q_outs, *k_outs, table, positions, *(places.arrays if places is not None else ())]
    pointers = [0 if x is None else x.ptr for x in tensors]
    strides = [s for x in (*inputs, *q_outs) for s in ((0, 0) if x is None else x.strides[:2])]
    strides += [s for x in k_outs for s in ((0,) * (3 if append else 2) if x is None else x.strides[:-1])]
    wide = (positions.dtype is INT64) << 16
    bounds: tuple[int, ...] = ()
    paged: tuple[int, ...] = ()
    if places is not None:
        wide |= places.wide
        bounds, paged = (places.num_indices, places.num_pages), (places.batch, places.page_size)
    values = (*pointers, *strides, table.strides[0], table.shape[0], *bounds, *heads, parts, wide, *paged, *scales)
    recipe = _recipe([*inputs, *q_outs, *k_outs], roles, append, m)
    wants = len(inputs) + len(q_outs) + len(k_outs) + 1  # the data and the table
    outputs = tuple([(tuple(view(x).shape), out_dtype) for x in m.made])
    _calls.launch(
        m.scalars, m.known, q_rope.view, kernel, q_rope.view.shape[0] * parts, values, len(pointers),
        has_pdl and enable_pdl is not False, m.remember and vec * dtype.itemsize == 16, outputs, recipe, wants,
    )  # fmt: skip


_INDICES = ("kv_indices", "kv_indptr", "batch_indices", "positions")


def _recipe(data: list[TensorView | None], roles: tuple[str, ...], append: bool, m: Memory) -> tuple[Source, ...]:
    """Where each pointer comes from: the call's tensor of that role, bytes behind its address."""
    places = {role: i for i, role in enumerate((*m.roles, *m.made_roles))}
    tensors = (*m.known, *m.made)
    recipe: list[Source] = []
    for x, role in zip(data, roles, strict=True):
        recipe.append(None if x is None else (places[role], x.ptr - view(tensors[places[role]]).ptr))
    for role in ("table", "pos_ids", *(("batch_indices", "positions", "kv_indices", "kv_indptr") if append else ())):
        recipe.append((places[role], 0))
    return tuple(recipe)


@functools.cache
def _kernel(
    device: int,
    dtype: str,
    out: str,
    rotary_dim: int,
    nope: int,
    interleave: bool,
    append: bool,
    value: int,
    vec: int,
) -> tuple[Kernel, bool]:
    """Kernel, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.rope import gen_rope_quantize

    spec = gen_rope_quantize(dtype, out, rotary_dim, nope, interleave, append, value, vec)
    return spec.build_and_load(device), pdl_supported(device)
