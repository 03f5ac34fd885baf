"""Runs an attention plan on the CPU: picks the kernel, lays out its arguments, merges split tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pyinfer.core.tensor import TensorView, _not_imagined
from pyinfer.cpu import decode, prefill, threads
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.softmax import LOG2E, U, exp2
from pyinfer.cpu.storage import CARRIERS, FP8_CARRIERS, from_f32
from pyinfer.cpu.user_calls import LINEAR
from pyinfer.cpu.variants import alibi_slopes, finish_row, output_row, pack_segments, set_place
from pyinfer.schedulers.plan import AttentionPlan

MAX_HEAD_DIM = min(decode.MAX_HEAD_DIM, prefill.MAX_HEAD_DIM)
TILE_KV = prefill.BLOCK
DTYPES = tuple(CARRIERS)
_CARRIERS = {**CARRIERS, **FP8_CARRIERS}

_NO_F32 = np.empty(0, np.float32)
_NO_I32 = np.zeros(0, np.int32)
_NO_I32.flags.writeable = False


class _Memory:
    """A tensor's memory as a flat array: kernels do their own address arithmetic with the view's strides.

    One array type for every layout means one compiled kernel for every layout; NumPy's own as_strided is three times slower.
    """

    __slots__ = ("__array_interface__", "base")

    def __init__(self, view: TensorView) -> None:
        carrier = np.dtype(_CARRIERS[view.dtype.name])
        extent = 1
        for size, stride in zip(view.shape, view.strides, strict=True):
            if size == 0:
                extent = 0
                break
            extent += (size - 1) * max(stride, 0)
        self.base = view
        self.__array_interface__ = {"data": (view.ptr, False), "shape": (extent,), "typestr": carrier.str, "version": 3}


def flat(view: TensorView) -> np.ndarray:
    """A CPU tensor's memory from its first element on as a one-axis storage array (int16 for float16, uint16 for bfloat16, …)."""
    _not_imagined(view)
    return np.asarray(_Memory(view))


def config(max_packed_rows: int, total_packed_rows: int, num_kv_heads: int) -> tuple[int, int, int]:
    """(tile_q, tile_kv, threads) for plans that run on the CPU.

    Few rows: one tile holds them. Many: 256 rows share a converted block of keys, fewer where there would be too few tiles for the threads.
    """
    n = threads.get_num_threads()
    if max_packed_rows <= decode.MAX_ROWS:
        return max(int(max_packed_rows), 1), TILE_KV, n
    tile_q = 256
    while tile_q > 64 and -(-total_packed_rows // tile_q) * num_kv_heads < 8 * n:
        tile_q //= 2
    return tile_q, TILE_KV, n


@kernel
def _merge_tiles(
    begin, end, splits, work, qo_indptr, kv_len, partial_o, partial_lse, out, lse, strides, dims, scales, sinks, user
):
    """Merge split tiles, in split order. Unit u: entry u // kv heads of `splits` (the first item of every split tile), kv head u % kv heads."""
    heads, group, dv, tile_q = dims[0], dims[1], U(dims[3]), dims[5]
    v_scale = scales[2]
    acc = np.empty(dv, np.float32)
    place = np.empty(8, np.int64)
    for unit in range(begin, end):
        item = splits[unit // heads]
        head = unit % heads
        request = work[item, 0]
        token0 = np.int64(qo_indptr[request])
        row0 = np.int64(work[item, 1])
        count = np.int64(work[item, 6])
        slot = np.int64(work[item, 7])
        for r in range(np.int64(work[item, 2])):
            top = np.float32(-np.inf)
            for i in range(count):
                top = max(top, partial_lse[((slot + i) * heads + head) * tile_q + r])
            total = np.float32(0)
            for i in range(dv):
                acc[i] = 0
            for i in range(count):
                cell = U(((slot + i) * heads + head) * tile_q + r)
                if partial_lse[cell] != np.float32(-np.inf):
                    weight = exp2(max(partial_lse[cell] - top, np.float32(-200)))
                    total += weight
                    for j in range(dv):
                        acc[j] += weight * partial_o[cell * dv + j]
            token = U(token0 + (row0 + r) // group)
            q_head = U(head * group + (row0 + r) % group)
            value, scale = finish_row(top, total, q_head, sinks)
            if user is not None:
                if user[LINEAR] != 0:
                    scale = np.float32(1)
            scale *= v_scale
            if user is not None:
                qo_len = np.int64(qo_indptr[request + 1]) - token0
                set_place(place, request, (row0 + r) // group, q_head, head, qo_len, kv_len[request])
                output_row(acc, U(0), dv, scale, place, user)
                scale = np.float32(1)
            dst = token * strides[8] + q_head * strides[9]
            for j in range(dv):
                out[dst + j] = from_f32(acc[j] * scale, out)
            if len(lse) > 0:
                lse[token * strides[10] + q_head * strides[11]] = value


class CpuExtras(NamedTuple):
    """What the options bring to a CPU run, host arrays all; None: off.

    Attributes
    ----------
    alibi
        Whether a bias slope[q_head] * (kv_idx - q_row) is added.
    rope
        (rope_scale, rope_theta).
    mask, mask_indptr
        uint8 bits and int32 [batch + 1] byte offsets, see `variants.transform_row`.
    sinks
        float32 [query heads], natural-log logits.
    prefix_len, token_pos
        int64 [batch] and [batch, longest].
    user
        A user's functions, from `user_variant.bind`.
    """

    alibi: bool = False
    rope: tuple[float, float] | None = None
    mask: np.ndarray | None = None
    mask_indptr: np.ndarray | None = None
    sinks: np.ndarray | None = None
    prefix_len: np.ndarray | None = None
    token_pos: np.ndarray | None = None
    user: np.ndarray | None = None


NO_EXTRAS = CpuExtras()


def pack_mask(mask: np.ndarray, indptr: np.ndarray, byte_indptr: np.ndarray) -> np.ndarray:
    """Little-endian bits of a boolean mask (uint8, flat), segments [indptr[b], indptr[b + 1]) each padded to whole bytes."""
    out = np.zeros(int(byte_indptr[-1]), np.uint8)
    threads.run(pack_segments, len(indptr) - 1, mask, indptr, byte_indptr, out)
    return out


@functools.lru_cache(maxsize=32)
def _frequency(dim: int, rope: tuple[float, float]) -> np.ndarray:
    from pyinfer.jit.rope import frequency_table

    return np.array(frequency_table(dim, *rope))  # a writable copy: a read-only array is another type to Numba


def _variant(plan: AttentionPlan, extras: CpuExtras, logits_soft_cap: float) -> tuple[np.ndarray | None, ...]:
    """The options as the kernels take them, in the units of the scores."""
    slopes = None
    if extras.alibi:
        unit = 2 * LOG2E / logits_soft_cap if logits_soft_cap > 0 else LOG2E
        slopes = (unit * alibi_slopes(plan.num_qo_heads)).astype(np.float32)
    sinks = None if extras.sinks is None else (np.float32(LOG2E) * extras.sinks).astype(np.float32)
    frequency = None if extras.rope is None else _frequency(plan.head_dim_qk, extras.rope)
    return slopes, extras.mask, extras.mask_indptr, extras.prefix_len, extras.token_pos, sinks, frequency, extras.user


def kv_strides(k: TensorView, v: TensorView, paged: bool, hnd: bool) -> tuple[int, ...]:
    """(k page, k token, k head, v page, v token, v head) strides in elements of 4-D paged caches or 3-D ragged tensors."""
    out: list[int] = []
    for t in (k, v):
        s = t.strides
        if paged:
            out += (s[0], s[2], s[1]) if hnd else (s[0], s[1], s[2])
        else:
            out += (0, s[1], s[0]) if hnd else (0, s[0], s[1])
    return tuple(out)


def run_plan(
    plan: AttentionPlan,
    q: TensorView,
    k: TensorView,
    v: TensorView,
    kv_layout: str,
    out: TensorView,
    lse: TensorView | None,
    *,
    sm_scale: float,
    logits_soft_cap: float,
    v_scale: float,
    workspace: np.ndarray | None = None,
    extras: CpuExtras = NO_EXTRAS,
) -> None:
    """Execute a plan on CPU tensors whose shapes have been checked.

    Parameters
    ----------
    q, out, lse
        [rows, query heads, dim], [rows, query heads, dim], float32 [rows, query heads] or None.
    k, v
        4-D caches if the plan is paged, else [tokens, kv heads, dim] (NHD) or [kv heads, tokens, dim] (HND).
    workspace
        uint8, at least plan.workspace_bytes; None: allocated here.
    extras
        The options beyond causality, window and soft cap.
    """
    if plan.n_work == 0:
        return
    ks = kv_strides(k, v, plan.page_size > 0, kv_layout == "HND")
    ls = (0, 0) if lse is None else lse.strides
    strides = np.array([*q.strides[:2], *ks, *out.strides[:2], *ls], np.int64).view(np.uint64)
    heads = plan.num_kv_heads
    dims = np.array([heads, plan.group_size, plan.head_dim_qk, plan.head_dim_vo, plan.page_size, plan.tile_q], np.int64)
    mask = np.array([plan.causal, plan.window_left], np.int64)
    if logits_soft_cap > 0:  # softmax_row works on cap * tanh(x / 2 / log2(e)), see variants._soft_cap
        scales = np.array([2 * LOG2E * sm_scale / logits_soft_cap, LOG2E * logits_soft_cap, v_scale], np.float32)
    else:
        scales = np.array([LOG2E * sm_scale, 0, v_scale], np.float32)
    if plan.num_partials:
        if workspace is None:
            workspace = np.empty(plan.workspace_bytes, np.uint8)
        at = plan.partial_lse_offset
        partial_o = workspace[:at].view(np.float32)
        partial_lse = workspace[at : plan.workspace_bytes].view(np.float32)
    else:
        partial_o = partial_lse = _NO_F32
    indices = _NO_I32 if plan.kv_indices is None else plan.kv_indices
    lse_array = _NO_F32 if lse is None else flat(lse)
    out_array = flat(out)
    arrays = (
        plan.work,
        plan.qo_indptr,
        plan.kv_indptr,
        plan.kv_len,
        indices,
        flat(q),
        flat(k),
        flat(v),
        out_array,
        lse_array,
        partial_o,
        partial_lse,
    )
    variant = _variant(plan, extras, logits_soft_cap)
    tail = (strides, dims, mask, scales, *variant)
    if plan.tile_q <= decode.MAX_ROWS:
        # All heads together read the pages in order; fewer a unit where there would be too few units to share among the threads.
        parts = min(heads, max(-(-4 * threads.get_num_threads() // plan.n_work), 1))
        parts = -(-heads // -(-heads // parts))
        threads.run(decode.decode_items, plan.n_work * parts, parts, *arrays, *tail, chunk=1)
    else:
        threads.run(prefill.prefill_items, plan.n_work * heads, *arrays, *tail, chunk=1)
    if plan.num_partials:
        splits = np.flatnonzero((plan.work[:, 6] > 1) & (plan.work[:, 5] == 0))
        threads.run(
            _merge_tiles,
            len(splits) * heads,
            splits,
            plan.work,
            plan.qo_indptr,
            plan.kv_len,
            partial_o,
            partial_lse,
            out_array,
            lse_array,
            strides,
            dims,
            scales,
            variant[5],
            extras.user,
        )
