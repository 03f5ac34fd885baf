"""Attention for tiles of many packed rows: blocks of keys are converted to float32 once per tile (keys transposed), then two small matrix products with a
tile softmax between them, all in one compiled function, one thread a (tile, kv head).

The products are written as 4 x 4 outer-product updates along contiguous rows, which LLVM turns into register-blocked FMA loops: on an AVX-512 core this
ran at 107 GFLOP/s against OpenBLAS's 74 for the same block, and leaves BLAS's own threads out of it.
"""

from __future__ import annotations

import numpy as np

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.softmax import U, lse_of, rescale_factor, softmax_row
from pyinfer.cpu.storage import from_f32, to_f32
from pyinfer.cpu.user_calls import LINEAR
from pyinfer.cpu.variants import angles, finish_row, linear_row, output_row, query_row, rotate, set_place, transform_row

MAX_HEAD_DIM = 256
BLOCK = 128  # kv tokens

_NB = U(BLOCK)
_OS = U(MAX_HEAD_DIM)  # row stride of values and outputs; a constant for the reason given in decode.py
_KB = U(64)  # depth of a panel: 64 x 128 floats of keys, 64 x 128 of values, 32 KiB each
_0, _1, _2, _3, _4, _16 = U(0), U(1), U(2), U(3), U(4), U(16)


@kernel
def _scores(qf, kt, s, rows4, d4, lo, hi):
    """s[rows4, _NB] = qf[rows4, d4] . kt[d4, _NB], for every four rows only columns lo[i]..hi[i] (multiples of 16)."""
    for k0 in range(_0, d4, _KB):
        k1 = min(k0 + _KB, d4)
        for r in range(_0, rows4, _4):
            j0 = lo[r // _4]
            j1 = hi[r // _4]
            c0 = r * _NB
            c1, c2, c3 = c0 + _NB, c0 + _2 * _NB, c0 + _3 * _NB
            if k0 == _0:
                for j in range(j0, j1):
                    s[c0 + j] = 0
                    s[c1 + j] = 0
                    s[c2 + j] = 0
                    s[c3 + j] = 0
            q0 = r * d4
            q1, q2, q3 = q0 + d4, q0 + _2 * d4, q0 + _3 * d4
            for k in range(k0, k1, _4):
                a00, a01, a02, a03 = qf[q0 + k], qf[q0 + k + _1], qf[q0 + k + _2], qf[q0 + k + _3]
                a10, a11, a12, a13 = qf[q1 + k], qf[q1 + k + _1], qf[q1 + k + _2], qf[q1 + k + _3]
                a20, a21, a22, a23 = qf[q2 + k], qf[q2 + k + _1], qf[q2 + k + _2], qf[q2 + k + _3]
                a30, a31, a32, a33 = qf[q3 + k], qf[q3 + k + _1], qf[q3 + k + _2], qf[q3 + k + _3]
                b0 = k * _NB
                b1, b2, b3 = b0 + _NB, b0 + _2 * _NB, b0 + _3 * _NB
                for j in range(j0, j1):
                    x0, x1, x2, x3 = kt[b0 + j], kt[b1 + j], kt[b2 + j], kt[b3 + j]
                    s[c0 + j] += a00 * x0 + a01 * x1 + a02 * x2 + a03 * x3
                    s[c1 + j] += a10 * x0 + a11 * x1 + a12 * x2 + a13 * x3
                    s[c2 + j] += a20 * x0 + a21 * x1 + a22 * x2 + a23 * x3
                    s[c3 + j] += a30 * x0 + a31 * x1 + a32 * x2 + a33 * x3


@kernel
def _accumulate(s, vf, o, rows4, d, lo, hi):
    """o[rows4, _OS] += s[rows4, _NB] . vf[_NB, _OS] over columns lo..hi of s and the first d columns of vf."""
    for k0 in range(_0, _NB, _KB):
        for r in range(_0, rows4, _4):
            k_begin = max(k0, lo[r // _4])
            k_end = max(min(k0 + _KB, hi[r // _4]), k_begin)  # an unsigned range must not run backwards
            c0 = r * _NB
            c1, c2, c3 = c0 + _NB, c0 + _2 * _NB, c0 + _3 * _NB
            o0 = r * _OS
            o1, o2, o3 = o0 + _OS, o0 + _2 * _OS, o0 + _3 * _OS
            for k in range(k_begin, k_end, _4):
                a00, a01, a02, a03 = s[c0 + k], s[c0 + k + _1], s[c0 + k + _2], s[c0 + k + _3]
                a10, a11, a12, a13 = s[c1 + k], s[c1 + k + _1], s[c1 + k + _2], s[c1 + k + _3]
                a20, a21, a22, a23 = s[c2 + k], s[c2 + k + _1], s[c2 + k + _2], s[c2 + k + _3]
                a30, a31, a32, a33 = s[c3 + k], s[c3 + k + _1], s[c3 + k + _2], s[c3 + k + _3]
                b0 = k * _OS
                b1, b2, b3 = b0 + _OS, b0 + _2 * _OS, b0 + _3 * _OS
                for i in range(d):
                    x0, x1, x2, x3 = vf[b0 + i], vf[b1 + i], vf[b2 + i], vf[b3 + i]
                    o[o0 + i] += a00 * x0 + a01 * x1 + a02 * x2 + a03 * x3
                    o[o1 + i] += a10 * x0 + a11 * x1 + a12 * x2 + a13 * x3
                    o[o2 + i] += a20 * x0 + a21 * x1 + a22 * x2 + a23 * x3
                    o[o3 + i] += a30 * x0 + a31 * x1 + a32 * x2 + a33 * x3


@kernel
def _visible(row, group, shift, t0, n, causal, window_left):
    """[begin, end) of the columns of the block at t0 that a packed row sees."""
    position = shift + row // group - t0
    end = n
    if causal:
        end = max(min(n, position + 1), 0)
    begin = np.int64(0)
    if window_left >= 0:
        begin = min(max(position - window_left, 0), end)
    return begin, end


@kernel
def prefill_items(
    begin, end, work, qo_indptr, kv_indptr, kv_len, kv_indices, q, k, v, out, lse, partial_o, partial_lse, strides, dims, mask, scales,
    slopes, bits, bits_indptr, prefix_len, token_pos, sinks, frequency, user,
):  # fmt: skip
    """Run units [begin, end) of a plan; unit u is work item u // kv heads, kv head u % kv heads. Parameters as `decode.decode_items`."""
    heads, group, dk, dv, page_size, tile_q = dims[0], dims[1], U(dims[2]), U(dims[3]), dims[4], dims[5]
    causal, window_left = mask[0], mask[1]
    q_scale, cap, v_scale = scales[0], scales[1], scales[2]
    max_rows = U((tile_q + 3) // 4 * 4)
    d4 = (dk + _3) // _4 * _4
    qf = np.empty(max_rows * d4, np.float32)
    kt = np.empty(d4 * _NB, np.float32)
    vf = np.empty(_NB * _OS, np.float32)
    s = np.empty(max_rows * _NB, np.float32)
    o = np.empty(max_rows * _OS, np.float32)
    m = np.empty(max_rows, np.float32)
    total = np.empty(max_rows, np.float32)
    lo = np.empty(max_rows // _4, np.uint64)
    hi = np.empty(max_rows // _4, np.uint64)
    place = np.empty(8, np.int64)
    x = np.empty(dk, np.float32)
    for i in range(dk * _NB, d4 * _NB):
        kt[i] = 0
    if frequency is not None:
        half = dk // _2
        cosine = np.empty(half, np.float32)
        sine = np.empty(half, np.float32)
    for unit in range(begin, end):
        item = unit // heads
        head = unit % heads
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
        rows4 = U((rows + 3) // 4 * 4)
        k_head = U(head) * strides[4]
        v_head = U(head) * strides[7]

        for r in range(rows4):
            m[r] = -np.inf
            total[r] = 0
            for i in range(r * _OS, r * _OS + dv):
                o[i] = 0
            for i in range(r * d4, r * d4 + d4):
                qf[i] = 0
            if r < U(rows):
                row = row0 + np.int64(r)
                src = U(token0 + row // group) * strides[0] + U(head * group + row % group) * strides[1]
                if frequency is not None:
                    angles(frequency, shift + row // group, cosine, sine, _0)
                if user is not None:
                    set_place(place, request, row // group, head * group + row % group, head, qo_len, length)
                    query_row(q, src, dk, x, place, user)
                    if frequency is not None:
                        rotate(x, _0, half, cosine, sine, _0, q_scale, qf, r * d4, _1)
                    else:
                        for i in range(dk):
                            qf[r * d4 + i] = x[i] * q_scale
                elif frequency is not None:
                    rotate(q, src, half, cosine, sine, _0, q_scale, qf, r * d4, _1)
                else:
                    for i in range(dk):
                        qf[r * d4 + i] = to_f32(q[src + i]) * q_scale

        for t0 in range(kv0, kv1, BLOCK):
            n = min(np.int64(BLOCK), kv1 - t0)
            n16 = U((n + 15) // 16 * 16)
            for t in range(n):
                token = t0 + t
                if page_size > 0:
                    page = U(kv_indices[first + token // page_size])
                    slot = U(token % page_size)
                    k_src = page * strides[2] + slot * strides[3] + k_head
                    v_src = page * strides[5] + slot * strides[6] + v_head
                else:
                    k_src = U(first + token) * strides[3] + k_head
                    v_src = U(first + token) * strides[6] + v_head
                column = U(t)
                if frequency is not None:
                    angles(frequency, token, cosine, sine, _0)
                    rotate(k, k_src, half, cosine, sine, _0, np.float32(1), kt, column, _NB)
                else:
                    for i in range(dk):
                        kt[i * _NB + column] = to_f32(k[k_src + i])
                for i in range(dv):
                    vf[column * _OS + i] = to_f32(v[v_src + i])
            for column in range(U(n), n16):
                for i in range(dk):
                    kt[i * _NB + column] = 0
                for i in range(dv):
                    vf[column * _OS + i] = 0

            # Every four rows compute the columns some row of theirs sees, to whole vectors; the rest is never touched.
            for r in range(0, rows, 4):
                first_row, _ = _visible(row0 + r, group, shift, t0, n, causal, window_left)
                _, last_row = _visible(row0 + min(r + 3, rows - 1), group, shift, t0, n, causal, window_left)
                lo[r // 4] = U(first_row // 16 * 16)
                hi[r // 4] = U((last_row + 15) // 16 * 16)
            _scores(qf, kt, s, rows4, d4, lo, hi)
            for r in range(rows):
                v0, v1 = _visible(row0 + r, group, shift, t0, n, causal, window_left)
                j = U(r)
                j0 = lo[j // _4]
                j1 = hi[j // _4]
                v0 = max(v0, np.int64(j0))
                v1 = max(v1, v0)
                if user is not None:
                    set_place(
                        place, request, (row0 + r) // group, head * group + (row0 + r) % group, head, qo_len, length
                    )
                transform_row(
                    s, j * _NB, U(v0), U(v1), t0, (row0 + r) // group, shift, length, head * group + (row0 + r) % group, request, cap,
                    slopes, bits, bits_indptr, prefix_len, token_pos, user, place,
                )  # fmt: skip
                if user is not None:
                    if user[LINEAR] != 0:
                        linear_row(s, j * _NB, j0, U(v0), U(v1), max(j1, j0))
                        continue
                new, weight = softmax_row(s, j * _NB, j0, U(v0), U(v1), max(j1, j0), m[j])
                if new != m[j]:
                    factor = rescale_factor(m[j], new)
                    total[j] *= factor
                    for i in range(j * _OS, j * _OS + dv):
                        o[i] *= factor
                    m[j] = new
                total[j] += weight
            for j in range(U(rows), rows4):
                for i in range(j * _NB + lo[j // _4], j * _NB + hi[j // _4]):
                    s[i] = 0
            _accumulate(s, vf, o, rows4, dv, lo, hi)

        for r in range(rows):
            j = U(r)
            src = j * _OS
            if work[item, 6] > 1:
                scale = np.float32(0)
                if total[j] != 0:
                    scale = np.float32(1) / total[j]
                if user is not None:
                    if user[LINEAR] != 0:
                        scale = np.float32(1)
                cell = U(((np.int64(work[item, 7]) + work[item, 5]) * heads + head) * tile_q + r)
                for i in range(dv):
                    partial_o[cell * dv + i] = o[src + i] * scale
                partial_lse[cell] = lse_of(m[j], total[j])
                if user is not None:
                    if user[LINEAR] != 0:
                        partial_lse[cell] = 0  # weighs 1 in the merge
            else:
                token = U(token0 + (row0 + r) // group)
                q_head = U(head * group + (row0 + r) % group)
                value, scale = finish_row(m[j], total[j], q_head, sinks)
                if user is not None:
                    if user[LINEAR] != 0:
                        scale = np.float32(1)
                scale *= v_scale
                dst = token * strides[8] + q_head * strides[9]
                if user is not None:
                    set_place(
                        place, request, (row0 + r) // group, head * group + (row0 + r) % group, head, qo_len, length
                    )
                    output_row(o, src, dv, scale, place, user)
                    scale = np.float32(1)
                for i in range(dv):
                    out[dst + i] = from_f32(o[src + i] * scale, out)
                if len(lse) > 0:
                    lse[token * strides[10] + q_head * strides[11]] = value
