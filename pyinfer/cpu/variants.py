"""What distinguishes one attention from another, as functions of a row of scores: both attention kernels call these, and nothing else knows of the options.

An option that is off is None. Numba compiles a kernel once per combination of argument types and drops the branches that None decides, so a combination of
options is a kernel of its own, compiled when it is first used and kept in the disk cache; with all of them off the kernels are the plain ones.

Scores are in base-2 units, as softmax.py has it (with a soft cap: in those `_soft_cap` takes). `attention.py` brings the options' numbers to the same units.
"""

from __future__ import annotations

import numpy as np

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.softmax import LOG2E, U, exp2, lse_of
from pyinfer.cpu.storage import to_f32
from pyinfer.cpu.user_calls import LINEAR, LOGITS, MASK, OUTPUT, PARAMS, QUERY, call_row
from pyinfer.cpu.vmath import sincos_turns

_MAX = np.float32(np.finfo(np.float32).max)
_NEG_INF = np.float32(-np.inf)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_UNDERFLOW = np.float32(-200)
_LN2 = np.float32(1 / LOG2E)
_LOG2E = np.float32(LOG2E)
_LN2_SQUARED = np.float32(0.5 / LOG2E**2)


@kernel
def _soft_cap(s, begin, end, cap):
    """s = cap * tanh(s / cap) with s given as 2 * log2(e) * (score / cap) and cap as cap * log2(e): tanh(x) = 1 - 2 / (1 + e^(2x))."""
    for j in range(begin, end):
        x = s[j]
        x = np.float32(60) if x > np.float32(60) else x  # tanh is 1 long before; keeps exp2 finite
        s[j] = cap - cap * _TWO / (_ONE + exp2(x))


@kernel
def _alibi(s, at, begin, end, distance, slope):
    """s += slope * (key - query), distance being that of column 0."""
    for j in range(begin, end):
        s[at + j] += slope * np.float32(distance + np.int64(j))


@kernel
def _apply_bits(s, at, begin, end, first, bits):
    """Columns whose bit is 0 become -inf; bit `first` belongs to column 0."""
    for j in range(begin, end):
        bit = first + j
        if (bits[bit >> U(3)] >> (bit & U(7))) & U(1) == U(0):
            s[at + j] = _NEG_INF


@kernel
def _hide(s, at, begin, end):
    for j in range(begin, end):
        s[at + j] = _NEG_INF


@kernel
def transform_row(
    s, at, begin, end, kv0, row, shift, kv_len, q_head, request, cap, slopes, bits, bits_indptr, prefix_len, token_pos, user, place,
):  # fmt: skip
    """Turn the products q . k of one query row into logits, and what it must not see into -inf.

    Parameters
    ----------
    s, at
        Scores: s[at + j] belongs to key kv0 + j of the request, for j in [begin, end) (uint64), which causality and window leave visible.
    row, shift
        The query token within the request, and the key position of query token 0 (so that the query stands at shift + row).
    kv_len, q_head, request
        Keys of the request, query head, index of the request.
    cap
        Soft cap times log2(e), 0 for none.
    slopes
        ALiBi: float32 [query heads], in units of the scores.
    bits, bits_indptr
        Custom mask: uint8 little-endian bits, rows of kv_len bits, and int32 [batch + 1] byte offsets.
    prefix_len, token_pos
        Multi-item scoring: int64 [batch], int64 [batch, longest].
    user, place
        A user's functions (`user_calls`) and where they are called; without softmax the row ends in natural units.
    """
    if slopes is not None:
        _alibi(s, at, begin, end, kv0 - row, slopes[q_head])
    if user is not None:
        place[2] = kv0
        if user[LOGITS] != 0:
            natural = cap * _LN2_SQUARED if cap > _ZERO else _LN2
            call_row(user[LOGITS], s, at, begin, end, place, user[PARAMS], natural, _ONE / natural)
    if cap > _ZERO:
        _soft_cap(s, at + begin, at + end, cap)
    if bits is not None:
        _apply_bits(s, at, begin, end, U(np.int64(bits_indptr[request]) * 8 + row * kv_len + kv0), bits)
    if prefix_len is not None:
        prefix = prefix_len[request]
        place = shift + row - prefix
        if place >= 0:  # a query behind the prefix sees the prefix and its own item, which began `back` keys ago
            back = np.int64(0)
            if place < token_pos.shape[1]:
                back = token_pos[request, place]
            first = max(prefix - kv0, np.int64(begin))
            last = min(shift + row - back + 1 - kv0, np.int64(end))
            if first < last:
                _hide(s, at, U(first), U(last))
    if user is not None:
        if user[MASK] != 0:
            call_row(user[MASK], s, at, begin, end, place, user[PARAMS], _ONE, _ONE)
        if user[LINEAR] != 0:
            for j in range(at + begin, at + end):
                s[j] *= _LN2


@kernel
def set_place(place, request, q_token, q_head, kv_head, qo_len, kv_len):
    """Where a user's functions are called, see `user_calls`."""
    place[0] = request
    place[1] = q_token
    place[3] = q_head
    place[4] = kv_head
    place[5] = qo_len
    place[6] = kv_len


@kernel
def query_row(q, src, d, x, place, user):
    """x[0..d) = q[src..src + d) as float32, through the user's query function."""
    for i in range(d):
        x[i] = to_f32(q[src + i])
    if user[QUERY] != 0:
        call_row(user[QUERY], x, U(0), U(0), d, place, user[PARAMS], _ONE, _ONE)


@kernel
def output_row(o, src, d, scale, place, user):
    """o[src..src + d) times scale, through the user's output function."""
    for i in range(d):
        o[src + i] *= scale
    if user[OUTPUT] != 0:
        call_row(user[OUTPUT], o, src, U(0), d, place, user[PARAMS], _ONE, _ONE)


@kernel
def linear_row(s, base, pad_begin, begin, end, pad_end):
    """What `softmax_row` is without softmax: [begin, end) are weights already, -inf (hidden) and the rest of [pad_begin, pad_end) become 0."""
    for j in range(base + pad_begin, base + begin):
        s[j] = _ZERO
    for j in range(base + end, base + pad_end):
        s[j] = _ZERO
    for j in range(base + begin, base + end):
        s[j] = _ZERO if s[j] == _NEG_INF else s[j]


@kernel
def finish_row(m, total, q_head, sinks):
    """A row's (base-2 LSE, factor of its output sum) from its maximum and sum of weights.

    `sinks`: float32 [query heads] times log2(e), a logit that joins the denominator and brings no value. A row that sees no key has LSE -inf, factor 0.
    """
    if total == _ZERO:
        return _NEG_INF, _ZERO
    if sinks is not None:
        sink = min(sinks[q_head], _MAX)
        if sink > m:
            own = exp2(max(m - sink, _UNDERFLOW))
            total = total * own + _ONE
            return lse_of(sink, total), own / total
        total += exp2(max(sink - m, _UNDERFLOW))
    return lse_of(m, total), _ONE / total


@kernel
def angles(frequency, position, cosine, sine, at):
    """Cosines and sines of a position's rotations, at index `at` on. A negative position (more queries than keys) wraps, and so does its angle."""
    turn = np.uint64(position)
    for i in range(U(len(frequency))):
        y, x = sincos_turns(turn * frequency[i])
        cosine[at + i] = x
        sine[at + i] = y


@kernel
def rotate(x, src, half, cosine, sine, at, scale, out, dst, step):
    """out[dst + i * step] = x[src + i], i < 2 * half, rotated in pairs (i, i + half) and scaled."""
    for i in range(half):
        a = to_f32(x[src + i]) * scale
        b = to_f32(x[src + half + i]) * scale
        c = cosine[at + i]
        d = sine[at + i]
        out[dst + i * step] = a * c - b * d
        out[dst + (half + i) * step] = b * c + a * d


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slopes, float64 [num_heads]: with n the largest power of two in it 2^(-8 k / n), k = 1..n, then 2^(-4 k / n) for odd k (Press et al., 2022)."""
    n = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    rest = 2.0 ** (-4.0 / n * np.arange(1, 2 * (num_heads - n) + 1, 2))
    return np.concatenate([first, rest])


@kernel(fastmath=False)
def pack_segments(begin, end, values, indptr, byte_indptr, out):
    """Pack booleans little-endian, segment by segment, each to whole bytes. Items are segments; `out` is zeroed, `values` uint8."""
    for b in range(begin, end):
        first = np.int64(indptr[b])
        at = np.int64(byte_indptr[b])
        for i in range(np.int64(indptr[b + 1]) - first):
            if values[first + i] != 0:
                out[at + (i >> 3)] |= np.uint8(1 << (i & 7))
