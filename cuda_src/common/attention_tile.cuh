// One warp's attention over a tile in shared memory, with mma.sync: M_BLOCKS * 16 query rows against KV_ROWS keys.
//
// Keys and values may be 8-bit floats: they are read by the same ldmatrix, in units of two bytes, and become 16-bit fragments in
// registers. Which column of the mma stands for which dimension is then another permutation, the same in both operands or undone where
// the output is written, so nothing is ever moved between lanes:
//   scores   lane t's four bytes of a 16-byte chunk are dims 4t..4t+3; they serve as the mma's k = 2t, 2t+1, 2t+8, 2t+9. The queries'
//            dims are permuted to match, once, in shared memory (`permute_queries`).
//   output   a transposed pair is dims 2g, 2g+1 of one key; the even dims of a 16-byte chunk make one column block, the odd ones the next.
#pragma once
#include "common/attention_variant.cuh"
#include "common/fp8.cuh"
#include "common/ptx_ldmatrix.cuh"
#include "common/ptx_mma.cuh"
#include "common/softmax.cuh"
#include "common/swizzle.cuh"

// The three ldmatrix lane maps. Each gives a lane's byte offset in a swizzled tile at row 0, column 0; `swizzled_step` moves it
// along a row. Rows move in steps of 16, which leaves row % 8, and so the swizzle, alone.
//
// A operand (queries): matrices are rows 0-7, rows 8-15, then the same 8 columns further on -> a[0..3] of the mma.
template <int ROW_BYTES>
PYINFER_DEVICE uint32_t lane_offset_a() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset<ROW_BYTES>(lane % 16, lane / 16);
}
// B operand, k contiguous (keys): matrices are (keys 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15) -> b0, b1 of two key blocks.
template <int ROW_BYTES>
PYINFER_DEVICE uint32_t lane_offset_b() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset<ROW_BYTES>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// B operand, n contiguous (values, transposed on the way): (keys 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15) -> b0, b1 of two
// dim blocks. The addresses are those of the A operand.
template <int ROW_BYTES>
PYINFER_DEVICE uint32_t lane_offset_b_trans() {
    return lane_offset_a<ROW_BYTES>();
}
// The address `columns` (a multiple of 16) elements further along a row: the swizzle sees only the low 3 bits of the chunk, bytes
// 16..127, so these are xored, and whole 128-byte blocks are added. `address` must come from a tile aligned to 128 bytes.
PYINFER_DEVICE uint32_t swizzled_step(uint32_t address, int columns) {
    const uint32_t bytes = columns * 2;
    return (address ^ (bytes & 127u)) + (bytes & ~127u);
}

// T is the type of queries and of the fragments, KeyT and ValueT what the tiles in shared memory hold.
template <typename T, typename KeyT, typename ValueT, int HEAD_DIM_QK, int HEAD_DIM_VO, int M_BLOCKS, int KV_ROWS>
struct AttentionTile {
    // Rows in shared memory are whole 128-byte blocks, of which the first head_dim elements, up to whole mma steps with zeros, are used.
    static constexpr int QK_BYTES = ceil_div(HEAD_DIM_QK * 2, 128) * 128;
    static constexpr int KEY_BYTES = ceil_div(HEAD_DIM_QK * sizeof(KeyT), 128) * 128;
    static constexpr int VALUE_BYTES = ceil_div(HEAD_DIM_VO * sizeof(ValueT), 128) * 128;
    static constexpr int VO_BYTES = ceil_div(HEAD_DIM_VO * 2, 128) * 128;
    static constexpr int QK_STEPS = ceil_div(HEAD_DIM_QK, 16);
    static constexpr int KV_BLOCKS = KV_ROWS / 8;
    static constexpr int VO_BLOCKS = ceil_div(HEAD_DIM_VO, 16) * 2;
    static constexpr bool KEY_8BIT = sizeof(KeyT) == 1;
    static constexpr bool VALUE_8BIT = sizeof(ValueT) == 1;
    static_assert(HEAD_DIM_QK % 8 == 0 && HEAD_DIM_VO % 8 == 0, "rows are whole 16-byte chunks of 16-bit elements");
    static_assert(KV_ROWS % 16 == 0, "keys come in ldmatrix blocks of 16");

    float out[M_BLOCKS][VO_BLOCKS][4];    // mma accumulators: lane (g, t) holds rows g, g + 8, columns 8 * block + 2 * t, + 1
    float score[M_BLOCKS][KV_BLOCKS][4];  // the same map, columns are keys
    OnlineSoftmax<M_BLOCKS> softmax;

    PYINFER_DEVICE void init() {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int d = 0; d < VO_BLOCKS; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[m][d][i] = 0.0f;
                }
            }
        }
        softmax.init();
    }

    // score = Q K^T. `load_q(step, a)` fills the A fragments of columns [16 step, 16 step + 16). Both row blocks use each K fragment.
    template <typename LoadQ>
    PYINFER_DEVICE void compute_scores(const LoadQ& load_q, uint32_t k_tile) {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[m][n][i] = 0.0f;
                }
            }
        }
        if constexpr (KEY_8BIT) {
            compute_scores_8bit(load_q, k_tile);
            return;
        }
        const uint32_t k_lane = k_tile + lane_offset_b<QK_BYTES>();
#pragma unroll
        for (int step = 0; step < QK_STEPS; ++step) {
            uint32_t a[M_BLOCKS][4];
            load_q(step, a);
#pragma unroll
            for (int pair = 0; pair < KV_ROWS / 16; ++pair) {
                uint32_t b[4];
                ldmatrix_x4(b, swizzled_step(k_lane, step * 16) + pair * 16 * QK_BYTES);
#pragma unroll
                for (int m = 0; m < M_BLOCKS; ++m) {
                    mma_m16n8k16<T>(score[m][2 * pair], a[m], b[0], b[1]);
                    mma_m16n8k16<T>(score[m][2 * pair + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // One ldmatrix is 16 keys x 32 dims: (keys 0-7, dims 0-15), (8-15, 0-15), (0-7, 16-31), (8-15, 16-31), the addresses of the A operand.
    // At an odd number of steps the last two matrices are padding, inside the row's 128-byte blocks, and not used.
    template <typename LoadQ>
    PYINFER_DEVICE void compute_scores_8bit(const LoadQ& load_q, uint32_t k_tile) {
        const uint32_t k_lane = k_tile + lane_offset_a<KEY_BYTES>();
#pragma unroll
        for (int steps = 0; steps < QK_STEPS; steps += 2) {
            uint32_t a[2][M_BLOCKS][4];
            load_q(steps, a[0]);
            if (steps + 1 < QK_STEPS) {
                load_q(steps + 1, a[1]);
            }
#pragma unroll
            for (int pair = 0; pair < KV_ROWS / 16; ++pair) {
                uint32_t chunk[4];
                ldmatrix_x4(chunk, swizzled_step(k_lane, steps * 8) + pair * 16 * KEY_BYTES);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (steps + i / 2 < QK_STEPS) {
                        uint32_t b0, b1;
                        unpack_fp8x4<T, KeyT>(chunk[i], b0, b1);
#pragma unroll
                        for (int m = 0; m < M_BLOCKS; ++m) {
                            mma_m16n8k16<T>(score[m][2 * pair + i % 2], a[i / 2][m], b0, b1);
                        }
                    }
                }
            }
        }
    }

    // Scores times a factor for each of a lane's two rows (of one row block).
    PYINFER_DEVICE void scale_rows(const float (&factor)[2]) {
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[0][n][i] *= factor[i / 2];
            }
        }
    }

    // The softmax takes the maximum before it scales, so a scale that is not positive is applied here. Returns the scale left to apply.
    PYINFER_DEVICE float make_scale_positive(float scale) {
        if (scale > 0.0f) {
            return scale;
        }
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[m][n][i] *= scale;
                }
            }
        }
        return 1.0f;
    }

    // The variant's logits, where it has any. `packed_row` and `kv_token` are this lane's row g of block 0 and its first key of the tile.
    template <typename Variant>
    PYINFER_DEVICE void transform_scores(const Variant& variant, const AttentionWork& w, int packed_row, int kv_token) {
        if constexpr (Variant::TRANSFORMS_LOGITS) {
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
                const typename Variant::Row rows[2] = {variant.row(w, packed_row + m * 16), variant.row(w, packed_row + m * 16 + 8)};
#pragma unroll
                for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        score[m][n][i] = variant.logits(score[m][n][i], rows[i / 2], kv_token + n * 8 + i % 2);
                    }
                }
            }
        }
    }

    // Scores that the row may not see become -inf. `token_of(packed_row)` gives a row's query token.
    template <typename Variant, typename TokenOf>
    PYINFER_DEVICE void mask_scores(const Variant& variant, const AttentionWork& w, int packed_row, int kv_token, const RowVisibility& visibility,
                                    const TokenOf& token_of) {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = packed_row + m * 16 + h * 8;
                const int token = token_of(row);
                const int begin = visibility.begin(token);
                const uint32_t span = max_of(visibility.end(token) - begin, 0);
                const int first = kv_token - begin;
                const typename Variant::Row known = variant.row(w, row);
#pragma unroll
                for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        bool visible = static_cast<uint32_t>(first + n * 8 + e) < span;
                        if constexpr (Variant::MASKS) {
                            visible = visible && variant.visible(known, kv_token + n * 8 + e);
                        }
                        score[m][n][2 * h + e] = visible ? score[m][n][2 * h + e] : Variant::hidden();
                    }
                }
            }
        }
    }

    // Softmax of the scores and out += P V. The weights of 16 keys are made just before their mma, so that the special-function unit
    // works on one step while the tensor cores work on the one before. P's accumulators are already the A fragments of the second product.
    // Without SOFTMAX the scores are the weights.
    template <bool SOFTMAX = true>
    PYINFER_DEVICE void accumulate(float scale, uint32_t v_tile) {
        if constexpr (SOFTMAX) {
            scale = softmax.update(score, out, scale);
        }
        float offset[M_BLOCKS][2];
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
            offset[m][0] = softmax.offset(m, 0);
            offset[m][1] = softmax.offset(m, 1);
        }
        const uint32_t v_lane = v_tile + lane_offset_b_trans<VALUE_BYTES>();
#pragma unroll
        for (int step = 0; step < KV_ROWS / 16; ++step) {
            uint32_t p[M_BLOCKS][4];
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float (&s)[4] = score[m][2 * step + half];
                    float w[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if constexpr (SOFTMAX) {
                            w[i] = softmax.weight(s[i], scale, offset[m][i / 2]);
                            softmax.sum[m][i / 2] += w[i];
                        } else {
                            w[i] = s[i];
                        }
                    }
                    p[m][2 * half] = pack2<T>(w[0], w[1]);
                    p[m][2 * half + 1] = pack2<T>(w[2], w[3]);
                }
            }
            if constexpr (VALUE_8BIT) {
                accumulate_8bit(p, v_lane + step * 16 * VALUE_BYTES);
                continue;
            }
#pragma unroll
            for (int pair = 0; pair < VO_BLOCKS / 2; ++pair) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, swizzled_step(v_lane, pair * 16) + step * 16 * VALUE_BYTES);
#pragma unroll
                for (int m = 0; m < M_BLOCKS; ++m) {
                    mma_m16n8k16<T>(out[m][2 * pair], p[m], b[0], b[1]);
                    mma_m16n8k16<T>(out[m][2 * pair + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

    // out += P V for 16 keys of 8-bit values: one ldmatrix is 16 keys x 32 dims, its matrices b0 and b1 of two chunks of 16 dims.
    PYINFER_DEVICE void accumulate_8bit(const uint32_t (&p)[M_BLOCKS][4], uint32_t v_rows) {
#pragma unroll
        for (int chunks = 0; chunks < VO_BLOCKS / 2; chunks += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, swizzled_step(v_rows, chunks * 8));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (chunks + i < VO_BLOCKS / 2) {
                    // Bytes (key 2t: even dim, odd dim; key 2t + 1: even, odd) -> the even dim of both keys, the odd dim of both keys.
                    uint32_t even[2], odd[2];
                    unpack_fp8x4<T, ValueT>(__byte_perm(b[2 * i], 0, 0x3120), even[0], odd[0]);
                    unpack_fp8x4<T, ValueT>(__byte_perm(b[2 * i + 1], 0, 0x3120), even[1], odd[1]);
#pragma unroll
                    for (int m = 0; m < M_BLOCKS; ++m) {
                        mma_m16n8k16<T>(out[m][2 * (chunks + i)], p[m], even[0], even[1]);
                        mma_m16n8k16<T>(out[m][2 * (chunks + i) + 1], p[m], odd[0], odd[1]);
                    }
                }
            }
        }
    }

    // ---- the output's places: out[m][d][2 * h + e] is row m * 16 + h * 8 + g, column ... ----
    PYINFER_DEVICE static int column(int d, int e) {
        const int t = threadIdx.x % 4;
        return VALUE_8BIT ? d / 2 * 16 + t * 4 + d % 2 + e * 2 : d * 8 + t * 2 + e;
    }
    // This lane's part of a row, times `factor`, into a row of floats: 8 bytes at a time, or 16. `row` must be 16-byte aligned.
    PYINFER_DEVICE void store_row(float* row, int m, int h, float factor) const {
        if constexpr (VALUE_8BIT) {
#pragma unroll
            for (int d = 0; d < VO_BLOCKS; d += 2) {
                if (column(d, 0) < HEAD_DIM_VO) {
                    *reinterpret_cast<float4*>(row + column(d, 0)) =
                        make_float4(out[m][d][2 * h] * factor, out[m][d + 1][2 * h] * factor, out[m][d][2 * h + 1] * factor, out[m][d + 1][2 * h + 1] * factor);
                }
            }
        } else {
#pragma unroll
            for (int d = 0; d < HEAD_DIM_VO / 8; ++d) {  // a quad writes 32 bytes: whole sectors
                *reinterpret_cast<float2*>(row + column(d, 0)) = make_float2(out[m][d][2 * h] * factor, out[m][d][2 * h + 1] * factor);
            }
        }
    }
};

// bf16 queries of 8-bit keys become f16, which takes an 8-bit value in one instruction where bf16 takes four. So that none leaves f16's range each row is
// multiplied by a power of two that brings its largest element to 2^14: what then falls below f16's smallest value is under 2^-38 of that. One warp, 16 rows;
// returns the power that undoes it for row `lane % 16`. A row with infinity or NaN keeps its scale.
template <int STEPS, int ROW_BYTES>
PYINFER_DEVICE float queries_to_f16(char* tile) {
    const int lane = threadIdx.x % 32;
    const auto chunk = [&](int i) -> uint4& { return *reinterpret_cast<uint4*>(tile + swizzled_offset<ROW_BYTES>(lane % 16, 2 * i + lane / 16)); };
    uint32_t highest = 0;  // magnitude, as a float's bits
    const auto look_at = [&](uint32_t pair) { highest = max_of(highest, max_of(pair & 0x7fff0000u, (pair << 16) & 0x7fff0000u)); };
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const uint4 x = chunk(i);
        look_at(x.x), look_at(x.y), look_at(x.z), look_at(x.w);
    }
    highest = max_of(highest, __shfl_xor_sync(0xffffffffu, highest, 16));
    const int exponent = static_cast<int>(highest >> 23);
    const int shift = exponent == 255 ? 0 : min_of(14 + 127 - exponent, 126);
    const float factor = __int_as_float((127 + shift) << 23);
    const auto convert = [&](uint32_t pair) {
        const float2 x = unpack2<bf16>(pair);
        return pack2<f16>(x.x * factor, x.y * factor);
    };
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        uint4& x = chunk(i);
        x = make_uint4(convert(x.x), convert(x.y), convert(x.z), convert(x.w));
    }
    return __int_as_float((127 - shift) << 23);
}

// The queries for 8-bit keys: within 16 columns, pairs (0 1)(2 3)...(14 15) become pairs 0, 2, 4, 6, 1, 3, 5, 7, so that the A fragment's
// k = 2t, 2t+1, 2t+8, 2t+9 are dims 4t..4t+3. One warp, ROWS rows of a swizzled tile; a lane moves whole groups of 16.
template <int STEPS, int ROW_BYTES, int ROWS>
PYINFER_DEVICE void permute_queries(char* tile) {
    for (int task = threadIdx.x % 32; task < ROWS * STEPS; task += 32) {
        const int row = task / STEPS, step = task % STEPS;
        uint4& first = *reinterpret_cast<uint4*>(tile + swizzled_offset<ROW_BYTES>(row, 2 * step));
        uint4& second = *reinterpret_cast<uint4*>(tile + swizzled_offset<ROW_BYTES>(row, 2 * step + 1));
        const uint4 a = first, b = second;
        first.x = a.x, first.y = a.z, first.z = b.x, first.w = b.z;
        second.x = a.y, second.y = a.w, second.z = b.y, second.w = b.w;
    }
}
