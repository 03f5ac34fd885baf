"""Multi-head latent attention on the CPU: one block of latent rows is converted once for all heads of a tile, as keys (transposed) and as values.

The two products are those of `cpu/prefill.py`; the values are cut into panels of its width.
"""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView
from pyinfer.cpu import threads
from pyinfer.cpu.attention import flat
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.prefill import BLOCK, MAX_HEAD_DIM, _accumulate, _scores, _visible
from pyinfer.cpu.softmax import LOG2E, U, exp2, lse_of, rescale_factor, softmax_row
from pyinfer.cpu.storage import from_f32, to_f32
from pyinfer.cpu.variants import _soft_cap
from pyinfer.schedulers.plan import AttentionPlan

TILE_Q = 64

_NB = U(BLOCK)
_OS = U(MAX_HEAD_DIM)  # columns of a panel
_0, _4, _16 = U(0), U(4), U(16)
_NO_F32 = np.empty(0, np.float32)


def config(max_packed_rows: int) -> tuple[int, int, int]:
    """(tile_q, tile_kv, threads) for plans that run on the CPU."""
    return min(max(int(max_packed_rows), 1), TILE_Q), BLOCK, threads.get_num_threads()


@kernel
def mla_items(
    begin, end, work, qo_indptr, kv_indptr, kv_len, kv_indices, q_nope, q_pe, ckv, kpe, out, lse, partial_o, partial_lse, strides, dims, mask, scales,
):  # fmt: skip
    """Run work items [begin, end) of a plan.

    Parameters
    ----------
    q_nope, q_pe, ckv, kpe, out, lse
        Storage arrays, flat. lse is empty if it is not wanted.
    strides
        uint64, elements: (token, head) of q_nope and of q_pe, (page, token) of ckv and of kpe, (token, head) of out and of lse.
    dims
        heads, latent dim, rotary dim, page_size, tile_q.
    mask
        causal, window_left.
    scales
        float32: of the scores' latent part (base 2; with a soft cap as `variants._soft_cap` has it), the cap, what the base-2 LSE is multiplied by, of the
        scores' rotary part, of the output.
    """
    heads, dc, dp, page_size, tile_q = dims[0], U(dims[1]), U(dims[2]), dims[3], dims[4]
    causal, window_left = mask[0], mask[1]
    q_scale, cap, lse_scale, pe_scale = scales[0], scales[1], scales[2], scales[3]
    panels = (dc + _OS - U(1)) // _OS
    max_rows = U((tile_q + 3) // 4 * 4)
    d4 = (dc + dp + U(3)) // _4 * _4
    qf = np.empty(max_rows * d4, np.float32)
    kt = np.empty(d4 * _NB, np.float32)
    vf = np.empty(panels * _NB * _OS, np.float32)
    s = np.empty(max_rows * _NB, np.float32)
    o = np.empty(panels * max_rows * _OS, np.float32)
    m = np.empty(max_rows, np.float32)
    total = np.empty(max_rows, np.float32)
    lo = np.empty(max_rows // _4, np.uint64)
    hi = np.empty(max_rows // _4, np.uint64)
    for i in range((dc + dp) * _NB, d4 * _NB):
        kt[i] = 0
    for item in range(begin, end):
        request = work[item, 0]
        row0 = np.int64(work[item, 1])
        rows = np.int64(work[item, 2])
        kv0 = np.int64(work[item, 3])
        kv1 = np.int64(work[item, 4])
        token0 = np.int64(qo_indptr[request])
        shift = np.int64(kv_len[request]) - (
            np.int64(qo_indptr[request + 1]) - token0
        )  # the kv position of query token 0
        first = np.int64(kv_indptr[request])
        rows4 = U((rows + 3) // 4 * 4)
        for i in range(len(o)):
            o[i] = 0
        for r in range(rows4):
            m[r] = -np.inf
            total[r] = 0
            for i in range(r * d4, r * d4 + d4):
                qf[i] = 0
            if r < U(rows):
                token = U(token0 + (row0 + np.int64(r)) // heads)
                head = U((row0 + np.int64(r)) % heads)
                src = token * strides[0] + head * strides[1]
                for i in range(dc):
                    qf[r * d4 + i] = to_f32(q_nope[src + i]) * q_scale
                src = token * strides[2] + head * strides[3]
                for i in range(dp):
                    qf[r * d4 + dc + i] = to_f32(q_pe[src + i]) * pe_scale

        for t0 in range(kv0, kv1, BLOCK):
            n = min(np.int64(BLOCK), kv1 - t0)
            n16 = U((n + 15) // 16 * 16)
            for t in range(n):
                page = U(kv_indices[first + (t0 + t) // page_size])
                slot = U((t0 + t) % page_size)
                src = page * strides[4] + slot * strides[5]
                column = U(t)
                for p in range(panels):
                    at = (p * _NB + column) * _OS
                    for i in range(min(_OS, dc - p * _OS)):
                        x = to_f32(ckv[src + p * _OS + i])
                        vf[at + i] = x
                        kt[(p * _OS + i) * _NB + column] = x
                src = page * strides[6] + slot * strides[7]
                for i in range(dp):
                    kt[(dc + i) * _NB + column] = to_f32(kpe[src + i])
            for column in range(U(n), n16):
                for i in range(dc + dp):
                    kt[i * _NB + column] = 0
                for p in range(panels):
                    for i in range((p * _NB + column) * _OS, (p * _NB + column) * _OS + _OS):
                        vf[i] = 0

            for r in range(0, rows, 4):  # the columns that some row of four sees, to whole vectors
                first_row, _ = _visible(row0 + r, heads, shift, t0, n, causal, window_left)
                _, last_row = _visible(row0 + min(r + 3, rows - 1), heads, shift, t0, n, causal, window_left)
                lo[r // 4] = U(first_row // 16 * 16)
                hi[r // 4] = U((last_row + 15) // 16 * 16)
            _scores(qf, kt, s, rows4, d4, lo, hi)
            for r in range(rows):
                v0, v1 = _visible(row0 + r, heads, shift, t0, n, causal, window_left)
                j = U(r)
                j0, j1 = lo[j // _4], hi[j // _4]
                v0 = max(v0, np.int64(j0))
                v1 = max(v1, v0)
                if cap > 0:
                    _soft_cap(s, j * _NB + U(v0), j * _NB + U(v1), cap)
                new, weight = softmax_row(s, j * _NB, j0, U(v0), U(v1), max(j1, j0), m[j])
                if new != m[j]:
                    factor = rescale_factor(m[j], new)
                    total[j] *= factor
                    for p in range(panels):
                        for i in range((p * max_rows + j) * _OS, (p * max_rows + j) * _OS + _OS):
                            o[i] *= factor
                    m[j] = new
                total[j] += weight
            for j in range(U(rows), rows4):
                for i in range(j * _NB + lo[j // _4], j * _NB + hi[j // _4]):
                    s[i] = 0
            for p in range(panels):
                values = vf[p * _NB * _OS : (p + U(1)) * _NB * _OS]
                sums = o[p * max_rows * _OS : (p + U(1)) * max_rows * _OS]
                _accumulate(s, values, sums, rows4, min(_OS, dc - p * _OS), lo, hi)

        for r in range(rows):
            j = U(r)
            scale = np.float32(0)
            if total[j] != 0:
                scale = scales[4] / total[j]
            if work[item, 6] > 1:
                cell = U((np.int64(work[item, 7]) + work[item, 5]) * tile_q + r)
                for i in range(dc):
                    partial_o[cell * dc + i] = o[(i // _OS * max_rows + j) * _OS + i % _OS] * scale
                partial_lse[cell] = lse_of(m[j], total[j])
            else:
                token = U(token0 + (row0 + r) // heads)
                head = U((row0 + r) % heads)
                dst = token * strides[8] + head * strides[9]
                for i in range(dc):
                    out[dst + i] = from_f32(o[(i // _OS * max_rows + j) * _OS + i % _OS] * scale, out)
                if len(lse) > 0:
                    lse[token * strides[10] + head * strides[11]] = lse_of(m[j], total[j]) * lse_scale


@kernel
def _merge_tiles(begin, end, splits, work, qo_indptr, partial_o, partial_lse, out, lse, strides, dims, scales):
    """Merge split tiles, in split order. Unit u: entry u of `splits`, the first items of the split tiles."""
    heads, dc, tile_q = dims[0], U(dims[1]), dims[4]
    acc = np.empty(dc, np.float32)
    for unit in range(begin, end):
        item = splits[unit]
        token0 = np.int64(qo_indptr[work[item, 0]])
        row0 = np.int64(work[item, 1])
        count = np.int64(work[item, 6])
        slot = np.int64(work[item, 7])
        for r in range(np.int64(work[item, 2])):
            top = np.float32(-np.inf)
            for i in range(count):
                top = max(top, partial_lse[(slot + i) * tile_q + r])
            total = np.float32(0)
            for j in range(dc):
                acc[j] = 0
            for i in range(count):
                cell = U((slot + i) * tile_q + r)
                if partial_lse[cell] != np.float32(-np.inf):
                    weight = exp2(max(partial_lse[cell] - top, np.float32(-200)))
                    total += weight
                    for j in range(dc):
                        acc[j] += weight * partial_o[cell * dc + j]
            scale = np.float32(0)
            if total > 0:
                scale = np.float32(1) / total
            token = U(token0 + (row0 + r) // heads)
            head = U((row0 + r) % heads)
            dst = token * strides[8] + head * strides[9]
            for j in range(dc):
                out[dst + j] = from_f32(acc[j] * scale, out)
            if len(lse) > 0:
                lse[token * strides[10] + head * strides[11]] = lse_of(top, total) * scales[2]


def run_mla(
    plan: AttentionPlan,
    q_nope: TensorView,
    q_pe: TensorView,
    ckv: TensorView,
    kpe: TensorView,
    out: TensorView,
    lse: TensorView | None,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    lse_base_e: bool = False,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
) -> None:
    """Execute a plan on checked CPU tensors.

    Parameters
    ----------
    q_nope, q_pe, out
        [tokens, heads, latent dim], [tokens, heads, rotary dim], [tokens, heads, latent dim].
    ckv, kpe
        [pages, page_size, latent dim], [pages, page_size, rotary dim].
    lse
        float32 [tokens, heads] or None. `lse_base_e`: natural logarithm instead of base 2.
    ckv_scale, kpe_scale
        What a stored value of the caches is worth.
    """
    if plan.n_work == 0:
        return
    ls = (0, 0) if lse is None else lse.strides
    ours = (*q_nope.strides[:2], *q_pe.strides[:2], *ckv.strides[:2], *kpe.strides[:2], *out.strides[:2], *ls)
    strides = np.array(ours, np.int64).view(np.uint64)
    dims = np.array([plan.num_qo_heads, out.shape[2], q_pe.shape[2], plan.page_size, plan.tile_q], np.int64)
    mask = np.array([plan.causal, plan.window_left], np.int64)
    lse_scale = 1 / LOG2E if lse_base_e else 1.0
    if logits_soft_cap > 0:
        score_scale, cap = 2 * LOG2E * sm_scale / logits_soft_cap, LOG2E * logits_soft_cap
    else:
        score_scale, cap = LOG2E * sm_scale, 0.0
    scales = np.array([score_scale * ckv_scale, cap, lse_scale, score_scale * kpe_scale, ckv_scale], np.float32)
    partial_o = partial_lse = _NO_F32
    if plan.num_partials:
        workspace = np.empty(plan.workspace_bytes, np.uint8)
        partial_o = workspace[: plan.partial_lse_offset].view(np.float32)
        partial_lse = workspace[plan.partial_lse_offset :].view(np.float32)
    assert plan.kv_indices is not None  # indices on a GPU make a plan for that GPU
    results = (flat(out), _NO_F32 if lse is None else flat(lse))
    inputs = (flat(q_nope), flat(q_pe), flat(ckv), flat(kpe))
    tables = (plan.work, plan.qo_indptr, plan.kv_indptr, plan.kv_len, plan.kv_indices)
    partials = (partial_o, partial_lse)
    threads.run(mla_items, plan.n_work, *tables, *inputs, *results, *partials, strides, dims, mask, scales, chunk=1)
    if plan.num_partials:
        splits = np.flatnonzero((plan.work[:, 6] > 1) & (plan.work[:, 5] == 0))
        merged = (splits, plan.work, plan.qo_indptr, *partials, *results, strides, dims, scales)
        threads.run(_merge_tiles, len(splits), *merged, chunk=1)
