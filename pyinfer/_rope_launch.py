"""The launch of the fused rotary kernels, and what a call of theirs is remembered by."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer._page import Places
from pyinfer.core.calls import Calls, Source
from pyinfer.core.dtypes import INT64
from pyinfer.core.errors import fail
from pyinfer.core.rows import vector_length
from pyinfer.core.tensor import TensorView, as_numpy, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.jit.rope import RopeConfig

calls = Calls()


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


def launch(
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
    from pyinfer.jit.rope import rope_config, rotary_blocks

    pairs, tokens = rotary_dim // 2, q_rope.view.shape[0]
    config = rope_config(pairs // vec, q_heads + kv_heads, tokens)
    parts = rotary_blocks(heads, pairs, nope, value, vec, config)
    kernel, has_pdl = _kernel(
        q_rope.view.device, dtype.name, out_dtype.name, rotary_dim, nope, not is_neox, append, value, vec, config
    )
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
    values = (*pointers, *strides, table.strides[0], table.shape[0], *bounds, *heads, *parts, wide, *paged, *scales)
    recipe = _recipe([*inputs, *q_outs, *k_outs], roles, append, m) if m.remember else None
    wants = len(inputs) + len(q_outs) + len(k_outs) + 1  # the data and the table
    outputs = tuple([(tuple(view(x).shape), out_dtype) for x in m.made])
    calls.launch(
        m.scalars, m.known, q_rope.view, kernel, tokens * parts[0], values, len(pointers),
        has_pdl and enable_pdl is not False, m.remember and vec * dtype.itemsize == 16, outputs, recipe, wants,
    )  # fmt: skip


INDICES = ("kv_indices", "kv_indptr", "batch_indices", "positions")


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
    config: RopeConfig,
) -> tuple[Kernel, bool]:
    """Kernel, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.rope import gen_rope_quantize

    spec = gen_rope_quantize(dtype, out, rotary_dim, nope, interleave, append, value, vec, config)
    return spec.build_and_load(device), pdl_supported(device)
