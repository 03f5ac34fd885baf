"""Attention for tiles of few packed rows (decode, speculative decode): one pass over the pages, nothing gathered.

A unit of work is a work item of the plan x a range of kv heads. All heads of a unit walk the keys together, a block of tokens at a time, so that pages
are read in the order they lie in memory (in NHD one token's heads are neighbours). Scores, weights and outputs are float32.

Rows come in fours: four query rows share every key row loaded, four value rows share every output row loaded. Tiles are padded to a multiple of four rows
with zero queries, blocks to a multiple of four tokens with zero weights.
"""

from __future__ import annotations

import numpy as np

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.softmax import U, lse_of, rescale_factor, softmax_row
from pyinfer.cpu.storage import from_f32, to_f32
from pyinfer.cpu.user_calls import LINEAR
from pyinfer.cpu.variants import angles, finish_row, linear_row, output_row, query_row, rotate, set_place, transform_row

MAX_ROWS = 32  # packed rows of a tile this kernel is meant for
MAX_HEAD_DIM = 256

_BLOCK = 32  # tokens; 32 x 8 heads x 128 floats of keys and values are 256 KiB, well inside L2
_B = U(_BLOCK)
# Row strides of the scratch arrays are constants: with run-time strides LLVM would need an overlap test for each pair of rows, and gives up vectorising.
_OS = U(MAX_HEAD_DIM)
_1, _2, _3, _4 = U(1), U(2), U(3), U(4)


@kernel
def _scores4(qf, at, d, k, koff, n, s, base, stride):
    """s[base + r * _B + t] = q row r . key t for four rows and n keys."""
    q0, q1, q2, q3 = at, at + stride, at + _2 * stride, at + _3 * stride
    for t in range(n):
        key = koff[t]
        a0 = np.float32(0)
        a1 = np.float32(0)
        a2 = np.float32(0)
        a3 = np.float32(0)
        for i in range(d):
            x = to_f32(k[key + i])
            a0 += qf[q0 + i] * x
            a1 += qf[q1 + i] * x
            a2 += qf[q2 + i] * x
            a3 += qf[q3 + i] * x
        s[base + t] = a0
        s[base + _B + t] = a1
        s[base + _2 * _B + t] = a2
        s[base + _3 * _B + t] = a3


@kernel
def _accumulate4(s, base, v, voff, n4, d, o, at):
    """o row r += sum_t s[base + r * _B + t] * value t for four rows; n4 is a multiple of four."""
    o1, o2, o3 = at + _OS, at + _2 * _OS, at + _3 * _OS
    for t in range(U(0), n4, _4):
        v0, v1, v2, v3 = voff[t], voff[t + _1], voff[t + _2], voff[t + _3]
        c = base + t
        p00, p01, p02, p03 = s[c], s[c + _1], s[c + _2], s[c + _3]
        c += _B
        p10, p11, p12, p13 = s[c], s[c + _1], s[c + _2], s[c + _3]
        c += _B
        p20, p21, p22, p23 = s[c], s[c + _1], s[c + _2], s[c + _3]
        c += _B
        p30, p31, p32, p33 = s[c], s[c + _1], s[c + _2], s[c + _3]
        for i in range(d):
            x0 = to_f32(v[v0 + i])
            x1 = to_f32(v[v1 + i])
            x2 = to_f32(v[v2 + i])
            x3 = to_f32(v[v3 + i])
            o[at + i] += p00 * x0 + p01 * x1 + p02 * x2 + p03 * x3
            o[o1 + i] += p10 * x0 + p11 * x1 + p12 * x2 + p13 * x3
            o[o2 + i] += p20 * x0 + p21 * x1 + p22 * x2 + p23 * x3
            o[o3 + i] += p30 * x0 + p31 * x1 + p32 * x2 + p33 * x3


@kernel
def decode_items(
    begin, end, parts, work, qo_indptr, kv_indptr, kv_len, kv_indices, q, k, v, out, lse, partial_o, partial_lse, strides, dims, mask, scales,
    slopes, bits, bits_indptr, prefix_len, token_pos, sinks, frequency, user,
):  # fmt: skip
    """Run units [begin, end) of a plan; unit u is work item u // parts, and part u % parts of the kv heads.

    Parameters
    ----------
    work, qo_indptr, kv_indptr, kv_len, kv_indices
        The plan's arrays.
    q, k, v, out
        Flat storage arrays; `strides` (uint64) holds q token, q head, k page, k token, k head, v page, v token, v head, out token, out head.
    lse
        float32, flat [tokens, heads] with strides[10:12], or empty.
    partial_o, partial_lse
        Flat, [partials, kv heads, tile_q, (head_dim_vo)].
    dims
        int64: kv heads, group, head_dim_qk, head_dim_vo, page_size (0: ragged), tile_q.
    mask
        int64: causal, window_left.
    scales
        float32: what q is multiplied with, soft cap * log2(e) (0: none), v_scale.
    slopes, bits, bits_indptr, prefix_len, token_pos, sinks
        Options, None if off: see `variants.transform_row` and `finish_row`.
    frequency
        RoPE: uint64 [head_dim_qk / 2], turns per position (`jit.rope.frequency_table`), or None.
    user
        A user's functions, int64 as `user_calls` has it, or None.
    """
    heads, group, dk, dv, page_size, tile_q = dims[0], dims[1], U(dims[2]), U(dims[3]), dims[4], dims[5]
    causal, window_left = mask[0], mask[1]
    q_scale, cap, v_scale = scales[0], scales[1], scales[2]
    rows4 = U((tile_q + 3) // 4 * 4)
    per_part = (heads + parts - 1) // parts
    state = U(per_part) * rows4
    qf = np.empty(state * dk, np.float32)
    o = np.empty(state * _OS, np.float32)
    m = np.empty(state, np.float32)
    total = np.empty(state, np.float32)
    s = np.empty(rows4 * _B, np.float32)
    koff = np.empty(_BLOCK, np.uint64)
    voff = np.empty(_BLOCK, np.uint64)
    kh = np.empty(_BLOCK, np.uint64)
    vh = np.empty(_BLOCK, np.uint64)
    place = np.empty(8, np.int64)
    x = np.empty(dk, np.float32)
    if frequency is not None:  # keys are rotated here, a block of one head at a time
        half = dk // _2
        cosine = np.empty(_B * half, np.float32)
        sine = np.empty(_B * half, np.float32)
        kr = np.empty(_B * dk, np.float32)
        kro = np.empty(_BLOCK, np.uint64)
        for t in range(_B):
            kro[t] = t * dk
    for unit in range(begin, end):
        item = unit // parts
        head0 = min((unit % parts) * per_part, heads)
        head1 = min(head0 + per_part, heads)
        request = work[item, 0]
        row0 = np.int64(work[item, 1])
        rows = np.int64(work[item, 2])
        kv0 = np.int64(work[item, 3])
        kv1 = np.int64(work[item, 4])
        token0 = np.int64(qo_indptr[request])
        qo_len = np.int64(qo_indptr[request + 1]) - token0
        length = np.int64(kv_len[request])
        shift = length - qo_len  # the kv position of query token 0
        first = np.int64(kv_indptr[request])

        for h in range(head1 - head0):
            for r in range(rows4):
                at = U(h) * rows4 + r
                m[at] = -np.inf
                total[at] = 0
                for i in range(at * _OS, at * _OS + dv):
                    o[i] = 0
                if r < U(rows):
                    row = row0 + np.int64(r)
                    src = U(token0 + row // group) * strides[0] + U((head0 + h) * group + row % group) * strides[1]
                    if frequency is not None:
                        angles(frequency, shift + row // group, cosine, sine, U(0))
                    if user is not None:
                        set_place(
                            place, request, row // group, (head0 + h) * group + row % group, head0 + h, qo_len, length
                        )
                        query_row(q, src, dk, x, place, user)
                        if frequency is not None:
                            rotate(x, U(0), half, cosine, sine, U(0), q_scale, qf, at * dk, _1)
                        else:
                            for i in range(dk):
                                qf[at * dk + i] = x[i] * q_scale
                    elif frequency is not None:
                        rotate(q, src, half, cosine, sine, U(0), q_scale, qf, at * dk, _1)
                    else:
                        for i in range(dk):
                            qf[at * dk + i] = to_f32(q[src + i]) * q_scale
                else:
                    for i in range(at * dk, at * dk + dk):
                        qf[i] = 0

        for t0 in range(kv0, kv1, _BLOCK):
            n = min(np.int64(_BLOCK), kv1 - t0)
            for t in range(n):
                token = t0 + t
                if page_size > 0:
                    page = U(kv_indices[first + token // page_size])
                    slot = U(token % page_size)
                    koff[t] = page * strides[2] + slot * strides[3]
                    voff[t] = page * strides[5] + slot * strides[6]
                else:
                    koff[t] = U(first + token) * strides[3]
                    voff[t] = U(first + token) * strides[6]
            n4 = U((n + 3) // 4 * 4)
            for t in range(n, np.int64(n4)):
                koff[t] = koff[n - 1]
                voff[t] = voff[n - 1]
            if frequency is not None:
                for t in range(U(n)):
                    angles(frequency, t0 + np.int64(t), cosine, sine, t * half)
            for h in range(head1 - head0):
                k_head = U(head0 + h) * strides[4]
                v_head = U(head0 + h) * strides[7]
                for t in range(n4):
                    kh[t] = koff[t] + k_head
                    vh[t] = voff[t] + v_head
                at = U(h) * rows4
                if frequency is not None:
                    for t in range(U(n)):
                        rotate(k, kh[t], half, cosine, sine, t * half, np.float32(1), kr, kro[t], _1)
                    for r in range(U(0), rows4, _4):
                        _scores4(qf, (at + r) * dk, dk, kr, kro, U(n), s, r * _B, dk)
                else:
                    for r in range(U(0), rows4, _4):
                        _scores4(qf, (at + r) * dk, dk, k, kh, U(n), s, r * _B, dk)
                for r in range(rows):
                    visible0 = np.int64(0)
                    visible1 = n
                    query = (row0 + r) // group
                    position = shift + query - t0
                    if causal:
                        visible1 = max(min(n, position + 1), 0)
                    if window_left >= 0:
                        visible0 = min(max(position - window_left, 0), visible1)
                    j = at + U(r)
                    if user is not None:
                        set_place(
                            place, request, query, (head0 + h) * group + (row0 + r) % group, head0 + h, qo_len, length
                        )
                    transform_row(
                        s, U(r) * _B, U(visible0), U(visible1), t0, query, shift, length, (head0 + h) * group + (row0 + r) % group, request, cap,
                        slopes, bits, bits_indptr, prefix_len, token_pos, user, place,
                    )  # fmt: skip
                    if user is not None:
                        if user[LINEAR] != 0:
                            linear_row(s, U(r) * _B, U(0), U(visible0), U(visible1), n4)
                            continue
                    new, weight = softmax_row(s, U(r) * _B, U(0), U(visible0), U(visible1), n4, m[j])
                    if new != m[j]:
                        factor = rescale_factor(m[j], new)
                        total[j] *= factor
                        for i in range(j * _OS, j * _OS + dv):
                            o[i] *= factor
                        m[j] = new
                    total[j] += weight
                for r in range(rows, np.int64(rows4)):
                    for i in range(U(r) * _B, U(r) * _B + n4):
                        s[i] = 0
                for r in range(U(0), rows4, _4):
                    _accumulate4(s, r * _B, v, vh, n4, dv, o, (at + r) * _OS)

        for h in range(head1 - head0):
            for r in range(rows):
                j = U(h) * rows4 + U(r)
                src = j * _OS
                if work[item, 6] > 1:
                    scale = np.float32(0)
                    if total[j] != 0:
                        scale = np.float32(1) / total[j]
                    if user is not None:
                        if user[LINEAR] != 0:
                            scale = np.float32(1)
                    slot = np.int64(work[item, 7]) + work[item, 5]
                    cell = U((slot * heads + head0 + h) * tile_q + r)
                    for i in range(dv):
                        partial_o[cell * dv + i] = o[src + i] * scale
                    partial_lse[cell] = lse_of(m[j], total[j])
                    if user is not None:
                        if user[LINEAR] != 0:
                            partial_lse[cell] = 0  # weighs 1 in the merge
                else:
                    token = U(token0 + (row0 + r) // group)
                    q_head = U((head0 + h) * group + (row0 + r) % group)
                    value, scale = finish_row(m[j], total[j], q_head, sinks)
                    if user is not None:
                        if user[LINEAR] != 0:
                            scale = np.float32(1)
                    scale *= v_scale
                    dst = token * strides[8] + q_head * strides[9]
                    if user is not None:
                        set_place(
                            place,
                            request,
                            (row0 + r) // group,
                            (head0 + h) * group + (row0 + r) % group,
                            head0 + h,
                            qo_len,
                            length,
                        )
                        output_row(o, src, dv, scale, place, user)
                        scale = np.float32(1)
                    for i in range(dv):
                        out[dst + i] = from_f32(o[src + i] * scale, out)
                    if len(lse) > 0:
                        lse[token * strides[10] + q_head * strides[11]] = value
