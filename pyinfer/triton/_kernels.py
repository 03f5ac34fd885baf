"""The Triton kernels. Imported when one is first called: triton is an optional dependency."""

# mypy: disable-error-code="operator,misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def saturate(x, LARGEST: tl.constexpr):
    """x within +-LARGEST (0: as it is); NaN stays NaN."""
    if LARGEST > 0:
        x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))
    return x


@triton.jit
def _read(x, residual, x_row, r_row, at, inside, x_scale, ADD: tl.constexpr):
    value = tl.load(x + x_row + at, inside, 0.0).to(tl.float32) * x_scale
    if ADD:
        value += tl.load(residual + r_row + at, inside, 0.0).to(tl.float32)
    return value


@triton.jit
def rmsnorm(
    x, residual, weight, out, x_scale, out_scale,
    x_outer, x_inner, r_outer, r_inner, o_outer, o_inner, inner, columns, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, HAS_X_SCALE: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, LARGEST: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row. Rows of more than a block are read twice; the residual is written only when the second reading has its old values."""
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    x_row = first * x_outer + second * x_inner
    r_row = first * r_outer + second * r_inner
    o_row = first * o_outer + second * o_inner
    scale_in = 1.0
    if HAS_X_SCALE:
        scale_in = tl.load(x_scale)
    scale_out = 1.0
    if HAS_OUT_SCALE:
        scale_out = tl.load(out_scale)
    at = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        inside = at < columns
        value = _read(x, residual, x_row, r_row, at, inside, scale_in, ADD)
        if ADD:
            tl.store(residual + r_row + at, value.to(residual.dtype.element_ty), inside)
        norm = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
        w = tl.load(weight + at, inside, 0.0).to(tl.float32) + BIAS
        result = saturate(value * norm * w * scale_out, LARGEST)
        tl.store(out + o_row + at, result.to(out.dtype.element_ty), inside)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, columns, BLOCK):
            here = begin + at
            value = _read(x, residual, x_row, r_row, here, here < columns, scale_in, ADD)
            squares += value * value
        norm = tl.rsqrt(tl.sum(squares, 0) / columns + eps)
        for begin in range(0, columns, BLOCK):
            here = begin + at
            inside = here < columns
            value = _read(x, residual, x_row, r_row, here, inside, scale_in, ADD)
            if ADD:
                tl.store(residual + r_row + here, value.to(residual.dtype.element_ty), inside)
            w = tl.load(weight + here, inside, 0.0).to(tl.float32) + BIAS
            result = saturate(value * norm * w * scale_out, LARGEST)
            tl.store(out + o_row + here, result.to(out.dtype.element_ty), inside)


@triton.jit
def act_and_mul(
    x, out, x_scale, out_scale, x_outer, x_inner, o_outer, o_inner, inner, columns,
    ACT: tl.constexpr, HAS_X_SCALE: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a tile of a row: gate at `columns` elements in front of up."""
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    source = x + first * x_outer + second * x_inner
    gate = tl.load(source + at, inside, 0.0).to(tl.float32)
    up = tl.load(source + columns + at, inside, 0.0).to(tl.float32)
    if HAS_X_SCALE:
        scale = tl.load(x_scale)
        gate *= scale
        up *= scale
    if ACT == 0:
        acted = gate / (1.0 + tl.exp(-gate))
    elif ACT == 1:
        acted = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner_value = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        acted = gate / (1.0 + tl.exp(-2.0 * inner_value))  # (1 + tanh u) / 2 = 1 / (1 + e^-2u)
    result = acted * up
    if HAS_OUT_SCALE:
        result *= tl.load(out_scale)
    result = saturate(result, LARGEST)
    tl.store(out + first * o_outer + second * o_inner + at, result.to(out.dtype.element_ty), inside)


@triton.jit
def merge_pair(
    va, sa, vb, sb, vo, so, mask,
    va_n, va_h, sa_n, sa_h, vb_n, vb_h, sb_n, sb_h, vo_n, vo_h, so_n, so_h, mask_n, dim,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token and head. May write over its first state."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    wanted = True
    if HAS_MASK:
        wanted = tl.load(mask + n * mask_n) != 0
    if wanted:
        at = tl.arange(0, BLOCK)
        s_a, s_b = tl.load(sa + n * sa_n + h * sa_h), tl.load(sb + n * sb_n + h * sb_h)
        most = tl.maximum(s_a, s_b)
        base = tl.where(most == float("-inf"), 0.0, most)
        w_a, w_b = tl.exp2(s_a - base), tl.exp2(s_b - base)
        total = w_a + w_b
        # An empty state's values are not looked at: whatever lies there, NaN too, counts for nothing.
        a = tl.load(va + n * va_n + h * va_h + at, at < dim, 0.0).to(tl.float32)
        b = tl.load(vb + n * vb_n + h * vb_h + at, at < dim, 0.0).to(tl.float32)
        a, b = tl.where(w_a > 0.0, a, 0.0), tl.where(w_b > 0.0, b, 0.0)
        v = tl.where(total > 0.0, (w_a * a + w_b * b) / total, 0.0)
        s = tl.where(total > 0.0, base + tl.log2(total), float("-inf"))
        tl.store(vo + n * vo_n + h * vo_h + at, v.to(vo.dtype.element_ty), at < dim)
        tl.store(so + n * so_n + h * so_h, s)


@triton.jit
def merge_many(
    v, s, indptr, vo, so, v_n, v_k, v_h, s_n, s_k, s_h, vo_n, vo_h, so_n, so_h, states, dim,
    HAS_INDPTR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token and head, over its states in their order: `states` of each token, or rows indptr[n] to indptr[n + 1] - 1."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if HAS_INDPTR:
        begin, end = tl.load(indptr + n).to(tl.int64), tl.load(indptr + n + 1).to(tl.int64)
        v_row, s_row = v + h * v_h, s + h * s_h
    else:
        begin, end = n * 0, n * 0 + states
        v_row, s_row = v + n * v_n + h * v_h, s + n * s_n + h * s_h
    at = tl.arange(0, BLOCK)
    most, total = float("-inf"), 0.0
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(begin, end):
        s_j = tl.load(s_row + j * s_k)
        larger = tl.maximum(most, s_j)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        old, new = tl.exp2(most - base), tl.exp2(s_j - base)
        v_j = tl.load(v_row + j * v_k + at, at < dim, 0.0).to(tl.float32)
        acc = acc * old + tl.where(new > 0.0, v_j, 0.0) * new
        total = total * old + new
        most = larger
    result = tl.where(total > 0.0, acc / total, 0.0)
    tl.store(vo + n * vo_n + h * vo_h + at, result.to(vo.dtype.element_ty), at < dim)
    tl.store(so + n * so_n + h * so_h, tl.where(total > 0.0, most + tl.log2(total), float("-inf")))


@triton.jit
def batch_positions(indptr, seq_lens, batch_indices, positions, batch, nnz, BLOCK: tl.constexpr):
    """A program a request, and one for the rows of none."""
    b = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if b < batch:
        begin, end = tl.load(indptr + b).to(tl.int64), tl.load(indptr + b + 1).to(tl.int64)
        shift = tl.load(seq_lens + b).to(tl.int64) - end
        for here in range(begin, tl.minimum(end, nnz), BLOCK):
            inside = (here + at < end) & (here + at < nnz)
            tl.store(batch_indices + here + at, tl.full([BLOCK], 0, tl.int32) + b, inside)
            tl.store(positions + here + at, (here + at + shift).to(tl.int32), inside)
    else:
        first, last = tl.load(indptr).to(tl.int64), tl.load(indptr + batch).to(tl.int64)
        for row in range(0, nnz, BLOCK):
            outside = ((row + at < first) | (row + at >= last)) & (row + at < nnz)
            tl.store(batch_indices + row + at, tl.full([BLOCK], -1, tl.int32), outside)
            tl.store(positions + row + at, tl.full([BLOCK], -1, tl.int32), outside)


@triton.jit
def seq_lens(indptr, last_page_len, out, page_size, batch, BLOCK: tl.constexpr):
    """Tokens of requests."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < batch
    pages = tl.load(indptr + b + 1, inside, 0).to(tl.int64) - tl.load(indptr + b, inside, 0).to(tl.int64)
    length = tl.maximum(pages - 1, 0) * page_size + tl.load(last_page_len + b, inside, 0).to(tl.int64)
    tl.store(out + b, length.to(tl.int32), inside)


@triton.jit
def append(
    key, value, key_cache, value_cache, batch_indices, positions, kv_indices, kv_indptr,
    k_n, k_h, v_n, v_h, kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    num_indices, num_pages, batch, page_size, k_dim, v_dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token and head. Tokens without a place are left out, as in the CUDA operator."""
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, position = tl.load(batch_indices + token).to(tl.int64), tl.load(positions + token).to(tl.int64)
    if (b >= 0) & (b < batch) & (position >= 0):
        entry = tl.load(kv_indptr + b).to(tl.int64) + position // page_size
        if (entry < tl.load(kv_indptr + b + 1).to(tl.int64)) & (entry >= 0) & (entry < num_indices):
            page, slot = tl.load(kv_indices + entry).to(tl.int64), position % page_size
            if (page >= 0) & (page < num_pages):
                at = tl.arange(0, BLOCK)
                k = tl.load(key + token * k_n + h * k_h + at, at < k_dim)
                tl.store(key_cache + page * kc_page + slot * kc_slot + h * kc_head + at, k, at < k_dim)
                v = tl.load(value + token * v_n + h * v_h + at, at < v_dim)
                tl.store(value_cache + page * vc_page + slot * vc_slot + h * vc_head + at, v, at < v_dim)


@triton.jit
def scale_rows(
    x, out, scale, x_outer, x_inner, o_outer, o_inner, inner, columns,
    ONE_SCALE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row. ONE_SCALE: results times the scale given; else divided by the row's own, its largest magnitude over LARGEST, which is stored."""
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    source, target = x + first * x_outer + second * x_inner, out + first * o_outer + second * o_inner
    at = tl.arange(0, BLOCK)
    if ONE_SCALE:
        factor = tl.load(scale)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, columns, BLOCK):
            value = tl.load(source + begin + at, begin + at < columns, 0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        nan = tl.max((most != most).to(tl.int32), 0)
        own = tl.where(nan > 0, float("nan"), tl.max(tl.where(most != most, 0.0, most), 0) / LARGEST)
        tl.store(scale + row, own)
        factor = tl.where(own == 0.0, 0.0, 1.0 / own)
    for begin in range(0, columns, BLOCK):
        inside = begin + at < columns
        value = tl.load(source + begin + at, inside, 0.0).to(tl.float32)
        result = saturate(value * factor, LARGEST)
        tl.store(target + begin + at, result.to(out.dtype.element_ty), inside)


@triton.jit
def packbits(x, out, x_stride, count, bytes_out, BIG: tl.constexpr, BLOCK: tl.constexpr):
    """A program BLOCK bytes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = at[:, None] * 8 + bit[None, :]
    value = (tl.load(x + place * x_stride, place < count, 0) != 0).to(tl.int32)
    shift = 7 - bit if BIG else bit
    byte = tl.sum(value << shift[None, :], 1)
    tl.store(out + at, byte.to(tl.uint8), at < bytes_out)
