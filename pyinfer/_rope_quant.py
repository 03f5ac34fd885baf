"""Rotary embedding with rounding to 8 bits, or with the append to a paged cache, in one launch: what `pyinfer.rope`'s functions of these names do."""

from __future__ import annotations

from typing import Any

from pyinfer._page import check_cache, check_places, one_head
from pyinfer._rope import check_indices, check_rotary, check_table
from pyinfer._rope_launch import INDICES, Heads, Outputs, calls, launch, memory
from pyinfer.core.calls import MISS
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
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
from pyinfer.core.scales import empty_fp8, fp8_dtype
from pyinfer.core.tensor import TensorView, empty, view

_HALVES = (FLOAT16, BFLOAT16)


def split_heads(op: str, arg: str, x: Any, dtypes: tuple[DType, ...] = _HALVES, flat_ok: bool = False) -> Heads:
    """View [tokens, heads, dim], or with `flat_ok` also [tokens, dim] as one head."""
    v = view(x, op, arg)
    check_ndim(op, arg, v, (2, 3) if flat_ok else 3)
    check_dtype(op, arg, v, dtypes)
    check_last_dim_contiguous(op, arg, v)
    return Heads(arg, one_head(v) if len(v.shape) == 2 else v)


def check_factors(op: str, scales: tuple[float, float]) -> None:
    """What queries and keys are multiplied by."""
    for arg, scale in (("quant_scale_q", scales[0]), ("quant_scale_kv", scales[1])):
        if not 0.0 < scale < float("inf"):
            fail(op, arg, "is no scale", scale, "a positive, finite number")


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
    result = calls.run(scalars, tuple([x for x in tensors if x is not None]))
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
    check_factors(op, scales)
    table = view(cos_sin_cache, op, "cos_sin_cache")
    positions = check_inputs(op, q_rope, k_rope, q_nope, k_nope, table, pos_ids)
    views = [None if o is None else view(o, op, f"{name}_out") for name, o in zip(names, outputs, strict=True)]
    dtype = fp8_dtype(op, "quantize_dtype", quantize_dtype, *views)
    made: list[Any] = []
    targets: list[TensorView | None] = []
    for i, (name, source, own) in enumerate(zip(names, (q_rope, k_rope, q_nope, k_nope), views, strict=True)):
        like = q_rope if i in (0, 2) else k_rope
        obj, target = _output(op, f"{name}_out", source, like, flat[i], outputs[i], own, dtype)
        made.append(obj)
        targets.append(target)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out = targets
    assert q_rope_out is not None and k_rope_out is not None
    out = Outputs(q_rope_out, q_nope_out, k_rope_out, k_nope_out, None, None)
    out_roles = tuple([f"{name}_out" for name in names])
    m = memory(scalars, (*names, "table", "pos_ids", *out_roles), tensors, out_roles, outputs, made)
    roles = (*names, "q_rope_out", "q_nope_out", "k_rope_out", "k_nope_out")
    launch(op, q_rope, k_rope, q_nope, k_nope, None, table, positions, out, is_neox, scales, enable_pdl, roles, m)
    return made[0], made[1], made[2], made[3]


def _output(
    op: str, arg: str, source: Heads | None, like: Heads, flat: bool, obj: Any, own: TensorView | None, dtype: DType
) -> tuple[Any, TensorView | None]:
    """An output as the caller gets it, checked or made, and as [tokens, heads, dim] (None: `source` is absent, and the output without elements)."""
    shape = (*like.view.shape[:2], 0) if source is None else tuple(source.view.shape)
    shape = (shape[0], shape[2]) if flat else shape
    if own is None:
        obj = empty_fp8(op, like.arg, like.view, shape, dtype)
        own = view(obj)
    else:
        check_dtype(op, arg, own, (dtype,))
        check_shape(op, arg, own, shape)
        check_last_dim_contiguous(op, arg, own)
        if own.device != like.view.device:
            check_same_device(op, {like.arg: like.view, arg: own})
    return obj, None if source is None else one_head(own) if flat else own


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
        several = isinstance(paged_kv_cache, list | tuple)
        got = type(paged_kv_cache).__name__ + (f" of {len(paged_kv_cache)}" if several else "")
        fail_type(op, "paged_kv_cache", "is no pair", got, "a tuple (k_cache, v_cache), or (ckv_cache, kpe_cache)")
    present = tuple([x is not None for x in inputs])
    given = tuple([o is not None for o in outputs])
    wanted = None if quantize_dtype is None else str(quantize_dtype)
    scalars = ("append", is_neox, wanted, scales, page_size, kv_layout, enable_pdl is not False, present, given)
    tensors = (*inputs, cos_sin_cache, pos_ids, *paged_kv_cache, *indices, *outputs)
    result = calls.run(scalars, tuple([x for x in tensors if x is not None]))
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
    check_factors(op, scales)
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
        pages, others = tuple(first.shape[:2]), tuple(second.shape[:2])
        fail(op, "paged_kv_cache[1]", "has other pages than paged_kv_cache[0]", others, pages)
    if first.shape[1] != page_size:
        fix = "Pass page_size as the cache has it."
        fail(op, "page_size", "is not the cache's", page_size, first.shape[1], fix)
    kv_indices, kv_indptr, batch_indices, positions = indices
    places = check_places(
        op, q_rope.arg, q_rope.view, batch_indices, positions, kv_indices, kv_indptr, None, first.shape[0], page_size
    )
    if first.device != q_rope.view.device or second.device != q_rope.view.device:
        check_same_device(op, {"q_rope": q_rope.view, "paged_kv_cache[0]": first, "paged_kv_cache[1]": second})
    made, targets = [], []
    for name, source, own, obj in zip(("q_rope", "q_nope"), (q_rope, q_nope), views, outputs, strict=True):
        obj, target = _output(op, f"{name}_out", source, q_rope, False, obj, own, dtype)
        made.append(obj)
        targets.append(target)
    assert targets[0] is not None
    out = Outputs(targets[0], targets[1], k_rope_cache, None if k_nope is None else k_nope_cache, v_cache, places)
    out_roles = ("q_rope_out", "q_nope_out")
    tensor_roles = (*names, "table", "pos_ids", "cache0", "cache1", *INDICES, *out_roles)
    m = memory(scalars, tensor_roles, tensors, out_roles, outputs, made)
    caches = ("cache1", "cache0", "") if mla else ("cache0", "cache0", "cache1")
    roles = (*names, *out_roles, *caches)
    launch(op, q_rope, k_rope, q_nope, k_nope, v, table, cache_positions, out, is_neox, scales, enable_pdl, roles, m)
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
    result = calls.run(scalars, tensors if q_out is not None else tensors[:-1])
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
    all_roles = ("q", "k", "v", "table", "pos_ids", *cache_roles, *INDICES, "q_out")
    m = memory(scalars, all_roles, tensors, ("q_out",), (q_out,), [obj])
    roles = ("q", "k", "q", "k", "v", "q_out", "q_out", "cache0", "cache0", "cache1" if pair else "cache0")
    launch(
        op,
        Heads("q", part_of(q_all.view, 0, rotary_dim)),
        Heads("k", part_of(k_all.view, 0, rotary_dim)),
        Heads("q", part_of(q_all.view, rotary_dim, dim)) if rest else None,
        Heads("k", part_of(k_all.view, rotary_dim, dim)) if rest else None,
        values, table, positions, out, is_neox, (1.0, 1.0), enable_pdl, roles, m,
    )  # fmt: skip
    return obj
