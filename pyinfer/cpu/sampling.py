"""Softmax, filters and samplers on the CPU.

The definitions are those of cuda_src/sampling/: masses are integers (each probability rounded up to a multiple of 2^-44 of its row's scale), so sums
do not depend on their order, and exp is the same sequence of IEEE operations as on the GPU. Equal inputs, seed and offset therefore give equal ids on
both backends. No fastmath in this file: contraction or reassociation would break that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.cpu.compile import kernel
from pyinfer.cpu.philox import scale_bits, uniform_bits
from pyinfer.cpu.storage import to_f32

ALL, MIN_P, JOINT, FIRST = range(4)
"""Filters of `sample_rows`, in the order of jit.sampling.FILTERS."""
UNLIMITED = np.int64(2**63 - 1)
SCALE_BITS = 44
MAX_VOCAB = 1 << 18

_INF_BITS = 0x7F800000
_F32 = ir.FloatType()
_I32 = ir.IntType(32)


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once (a library call where the CPU has no FMA, but never two roundings)."""
    return types.float32(
        types.float32, types.float32, types.float32
    ), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], _F32)


@intrinsic
def _as_bits(typingctx: Any, x: Any) -> Any:
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _I32)


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693147182464599609375)  # the float nearest ln 2 ...
_LN2_LOW = np.float32(-1.904654290582768e-09)  # ... and what it lacks
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
_C2 = np.float32(0.4999999403953552)
_C3 = np.float32(0.1666651964187622)
_C4 = np.float32(0.04166839271783829)
_C5 = np.float32(0.008368780836462975)
_C6 = np.float32(0.0013814467238262296)
_LOWEST = np.float32(-87.0)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@kernel(fastmath=False)
def exp_nonpositive(d: Any) -> Any:
    """exp(d) in float32 for d <= 0, within 1.5 ulp; 0 below -87 (where the result would leave the normal range) and for NaN.

    2^n * e^r with n = round(d / ln 2) and a degree 6 polynomial for e^r (minimax fit of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2).
    """
    shifted = _fma(d, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = _fma(n, -_LN2_HIGH, d)
    r = _fma(n, -_LN2_LOW, r)
    tail = _fma(_fma(_fma(_fma(_C6, r, _C5), r, _C4), r, _C3), r, _C2)
    value = _fma(r * r, tail, r) + _ONE
    scaled = _as_float(np.int32(_as_bits(value) + (_as_bits(shifted) << np.int32(23))))
    return scaled if d >= _LOWEST else _ZERO


@kernel(fastmath=False)
def _scale_exponent(max_bits: Any) -> Any:
    """s such that masses are counted in units of 2^-s: 44 for a row of probabilities, else what brings the largest value into [2^44, 2^45).

    "A row of probabilities" is one whose largest value lies in [2^-19, 2): with at most 2^18 tokens a normalised row always does.
    """
    exponent = max(max_bits >> 23, 1)
    return 44 if 108 <= exponent <= 127 else 44 + 127 - exponent


@kernel(fastmath=False)
def _mass(p: Any, scale: Any) -> Any:
    """ceil(p * 2^s): at least one unit for every positive p, so that whatever can be kept can be drawn. Exact in float64."""
    return np.int64(math.ceil(np.float64(p) * scale))


@kernel(fastmath=False)
def _mass_to_f32(mass: Any, s: Any) -> Any:
    """mass * 2^-s as float32, in two exact steps because 2^-s itself may not be a float32."""
    half = s // 2
    return np.float32(
        np.float32(np.float32(mass) * np.float32(math.ldexp(1.0, -half))) * np.float32(math.ldexp(1.0, half - s))
    )


@kernel(fastmath=False)
def _top_p_units(top_p: Any, s: Any) -> Any:
    """The mass limit of top_p in units of 2^-s: at least 1 (the most probable tokens are always kept), unlimited from 1.0 on."""
    if not top_p < _ONE:  # 1 and above: keep all; NaN too
        return UNLIMITED
    limit = math.ceil(math.ldexp(np.float64(max(top_p, _ZERO)), s))
    if limit >= 2.0**63:
        return UNLIMITED
    return max(np.int64(limit), np.int64(1))


@kernel(fastmath=False)
def _top_p_share(top_p: Any, mass: Any) -> Any:
    """ceil(top_p * mass), exactly: top_p is a 24-bit integer m times 2^-e, and m * mass needs up to 87 bits."""
    if not top_p < _ONE:
        return UNLIMITED
    bits = _as_bits(top_p)
    if bits <= 0:
        return np.int64(1)
    exponent = np.int64(bits >> 23)
    m = np.int64(bits & 0x7FFFFF) | (np.int64(0x800000) if exponent > 0 else np.int64(0))
    e = 150 - max(exponent, 1)  # 24 or more, since top_p < 1
    low = m * (mass & 0xFFFFFFFF)
    high = m * (mass >> 32) + (low >> 32)
    low &= 0xFFFFFFFF
    if e < 32:
        share = (high << (32 - e)) + (low >> e)
        rest = low & ((np.int64(1) << e) - 1)
    elif e < 94:
        share = high >> (e - 32)
        rest = low | (high & ((np.int64(1) << (e - 32)) - 1))
    else:
        share = np.int64(0)
        rest = np.int64(1)
    return max(share + (1 if rest != 0 else 0), np.int64(1))


@kernel(fastmath=False)
def _search(
    bits: Any, bias: Any, p: Any, scale: Any, with_mass: Any, k: Any, limit: Any, lowest: Any, count: Any, mass: Any
) -> Any:
    """The smallest key t such that value x is accepted iff key(x) >= t, where x is accepted iff count(> x) < k and mass(> x) < limit.

    Radix selection from the top: a histogram of the next digit (11, 11, 10 bits) over the elements of the current bin; acceptance is monotone, so the
    boundary lies in the lowest non-empty bin whose largest value is still accepted. Ends early when that bin is accepted as a whole.

    Parameters
    ----------
    bits, bias
        Keys are int64(bits[i]) + bias, in 0..2^32-1; those below `lowest` do not exist.
    p, scale
        Probabilities and 2^s for the masses; ignored without `with_mass`.
    count, mass
        Work space, int64 [2048] each.

    Returns
    -------
    (int, int, int)
        t, the mass and the number of accepted elements.
    """
    low, high = np.int64(lowest), np.int64(2**32 - 1)
    base = np.int64(0)
    count_above, mass_above = np.int64(0), np.int64(0)
    for shift in (21, 10, 0):
        count[:] = 0
        mass[:] = 0
        for i in range(bits.shape[0]):
            key = np.int64(bits[i]) + bias
            if low <= key <= high:
                digit = (key - base) >> shift
                count[digit] += 1
                if with_mass:
                    mass[digit] += _mass(p[i], scale)
        chosen = np.int64(-1)
        count_at, mass_at = count_above, mass_above  # above the chosen bin
        count_in, mass_in = count_above, mass_above  # running: above and including the bin
        for digit in range(2047, -1, -1):
            if count[digit] == 0:
                continue
            if count_in >= k or mass_in >= limit:
                break
            chosen = digit
            count_at, mass_at = count_in, mass_in
            count_in += count[digit]
            mass_in += mass[digit]
        if chosen < 0:
            return low, mass_above, count_above
        base += chosen << shift
        low = max(low, base)
        high = base + (np.int64(1) << shift) - 1
        if count[chosen] == 1 or (count_in <= k and mass_in <= limit):
            return low, mass_in, count_in
        count_above, mass_above = count_at, mass_at
    return low, mass_in, count_in


@kernel(fastmath=False)
def _softmax_row(x: Any, inverse_temperature: Any, p: Any) -> Any:
    """p = softmax(x * inverse_temperature). Returns (valid, max): not valid if a value is NaN (p is NaN) or all are -inf (p is 0)."""
    vocab = x.shape[0]
    top = np.float32(-np.inf)
    has_nan = False
    for i in range(vocab):
        v = to_f32(x[i])
        if v > top:
            top = v
        has_nan |= v != v
    if has_nan or top == np.float32(-np.inf):
        p[:] = np.float32(np.nan) if has_nan else _ZERO
        return False, top
    for i in range(vocab):
        v = to_f32(x[i])
        w = exp_nonpositive((v - top) * inverse_temperature)
        p[i] = _ONE if v == top else w  # v - top is NaN if both are +inf
    total = np.int64(0)
    scale = np.float64(2.0**44)
    for i in range(vocab):
        total += _mass(p[i], scale)
    inverse = _ONE / _mass_to_f32(total, np.int64(44))
    for i in range(vocab):
        p[i] = p[i] * inverse
    return True, top


@kernel(fastmath=False)
def _load_row(x: Any, p: Any) -> Any:
    """p = x as float32 (-0 becomes 0). Returns the largest value's bits, or -1 if a value is NaN, infinite or negative."""
    top = np.int32(0)
    bad = False
    for i in range(x.shape[0]):
        v = to_f32(x[i]) + _ZERO
        p[i] = v
        bits = _as_bits(v)
        bad |= bits < 0 or bits >= _INF_BITS
        top = max(top, bits)
    return np.int64(-1) if bad else np.int64(top)


@kernel(fastmath=False)
def _pick(p: Any, bits: Any, lowest: Any, scale: Any, target: Any) -> Any:
    """The first id whose inclusive prefix mass over the kept values (bits >= lowest) exceeds `target`."""
    running = np.int64(0)
    for i in range(bits.shape[0]):
        if bits[i] >= lowest:
            running += _mass(p[i], scale)
            if running > target:
                return np.int32(i)
    return np.int32(0)  # not reached: target < total mass


@kernel(fastmath=False)
def _row(memory: Any, first: Any, stride: Any, row: Any, vocab: Any) -> Any:
    begin = first + row * stride
    return memory[begin : begin + vocab]


@kernel(fastmath=False)
def _first_equal(x: Any, value: Any) -> Any:
    """The first index at which x holds `value`."""
    for j in range(x.shape[0]):
        if to_f32(x[j]) == value:
            return np.int32(j)
    return np.int32(0)  # not reached: value is the row's maximum


@kernel(fastmath=False)
def sample_rows(
    begin: Any,
    end: Any,
    memory: Any,
    first: Any,
    stride: Any,
    num_rows: Any,
    vocab: Any,
    from_logits: Any,
    filter_kind: Any,
    rows: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seed: Any,
    offset: Any,
    word: Any,
    out: Any,
    valid: Any,
) -> None:
    """out[i] = a token drawn from row rows[i]; valid[i] = 0 and out[i] = 0 where the row cannot be sampled.

    Row r is memory[first + r * stride :][:vocab], r in 0..num_rows-1.

    One value per output in rows, top_k, word (int64), top_p, min_p (float32), seed and offset (uint64).
    """
    p = np.empty(vocab, np.float32)
    bits = p.view(np.int32)
    count = np.empty(2048, np.int64)
    mass = np.empty(2048, np.int64)
    loaded = np.int64(-1)
    top_logit = _ZERO
    top = np.int64(0)
    for i in range(begin, end):
        row = rows[i]
        out[i] = 0
        valid[i] = 0
        if row < 0 or row >= num_rows:
            continue
        x = _row(memory, first, stride, row, vocab)
        if row != loaded:  # outputs that share a row (indices) load it once
            if from_logits:
                _, top_logit = _softmax_row(x, _ONE, p)
                top = _load_row(p, p)
            else:
                top = _load_row(x, p)
            loaded = row
        if top <= 0:
            continue
        valid[i] = 1
        k = max(top_k[i], np.int64(1))
        if filter_kind >= JOINT and k == 1:
            # The argmax of the input, lowest id first: of the logits themselves, for softmax may round two of them to one probability.
            out[i] = _first_equal(x, top_logit) if from_logits else _first_equal(p, _as_float(np.int32(top)))
            continue
        s = _scale_exponent(top)
        scale = math.ldexp(1.0, s)
        lowest = np.int64(1)  # bits of the smallest kept value; zeros are never kept
        total = np.int64(-1)
        if filter_kind == MIN_P:
            threshold = min_p[i] * _as_float(np.int32(top))
            if not threshold <= _as_float(np.int32(top)):  # NaN or above 1: the most probable tokens stay
                threshold = _as_float(np.int32(top))
            lowest = max(lowest, np.int64(_as_bits(threshold + _ZERO)))
        elif filter_kind >= JOINT:
            limit = _top_p_units(top_p[i], s) if filter_kind == JOINT else UNLIMITED
            if k < vocab or limit != UNLIMITED:
                lowest, total, _ = _search(bits, 0, p, scale, True, k, limit, lowest, count, mass)
        if total < 0:
            total = np.int64(0)
            for j in range(vocab):
                if bits[j] >= lowest:
                    total += _mass(p[j], scale)
        if filter_kind == FIRST:
            limit = _top_p_share(top_p[i], total)
            if limit != UNLIMITED:
                lowest, total, _ = _search(bits, 0, p, scale, True, UNLIMITED, limit, lowest, count, mass)
        target = scale_bits(uniform_bits(seed[i], offset[i], word[i]), total)
        out[i] = _pick(p, bits, lowest, scale, target)


@kernel(fastmath=False)
def softmax_rows(
    begin: Any,
    end: Any,
    memory: Any,
    first: Any,
    stride: Any,
    num_rows: Any,
    vocab: Any,
    inverse_temperature: Any,
    out: Any,
) -> None:
    """out[i] = softmax(row i * inverse_temperature[i]), float32."""
    for i in range(begin, end):
        _softmax_row(_row(memory, first, stride, i, vocab), inverse_temperature[i], out[i])


@kernel(fastmath=False)
def renorm_rows(
    begin: Any,
    end: Any,
    memory: Any,
    first: Any,
    stride: Any,
    num_rows: Any,
    vocab: Any,
    top_k: Any,
    top_p: Any,
    out: Any,
) -> None:
    """out[i] = the values of row i that the filter keeps, divided by their sum. top_k = 2^63-1 or top_p = 1 switch a filter off."""
    count = np.empty(2048, np.int64)
    mass = np.empty(2048, np.int64)
    for i in range(begin, end):
        p = out[i]
        bits = p.view(np.int32)
        top = _load_row(_row(memory, first, stride, i, vocab), p)
        if top <= 0:
            p[:] = np.float32(np.nan) if top < 0 else _ZERO
            continue
        s = _scale_exponent(top)
        scale = math.ldexp(1.0, s)
        lowest, total, _ = _search(
            bits, 0, p, scale, True, max(top_k[i], np.int64(1)), _top_p_units(top_p[i], s), 1, count, mass
        )
        divisor = _mass_to_f32(total, s)
        for j in range(p.shape[0]):
            p[j] = p[j] / divisor if bits[j] >= lowest else _ZERO


@kernel(fastmath=False)
def mask_rows(
    begin: Any, end: Any, memory: Any, first: Any, stride: Any, num_rows: Any, vocab: Any, top_k: Any, out: Any
) -> None:
    """out[i] = row i where at least as large as its k-th largest value, else -inf; NaN stays NaN and does not count."""
    keys = np.empty(vocab, np.int32)
    count = np.empty(2048, np.int64)
    mass = np.empty(2048, np.int64)
    for i in range(begin, end):
        x = _row(memory, first, stride, i, vocab)
        for j in range(vocab):
            v = to_f32(x[j])
            out[i, j] = v
            b = _as_bits(v + _ZERO)
            # Negative floats descend as integers: flip them, so that keys ascend as values do. NaN gets the lowest key, which is left out.
            keys[j] = np.int32(-0x80000000) if v != v else (b ^ np.int32(0x7FFFFFFF) if b < 0 else b)
        k = max(top_k[i], np.int64(1))
        if k >= vocab:
            continue
        lowest, _, _ = _search(keys, 2**31, out[i], 1.0, False, k, UNLIMITED, 1, count, mass)
        for j in range(vocab):
            if np.int64(keys[j]) + 2**31 < lowest and out[i, j] == out[i, j]:
                out[i, j] = np.float32(-np.inf)
