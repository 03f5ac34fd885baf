// One warp's attention over a tile in shared memory, with mma.sync: M_BLOCKS * 16 query rows against KV_ROWS keys.
#pragma once
#include "common/attention_variant.cuh"
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

template <typename T, int HEAD_DIM_QK, int HEAD_DIM_VO, int M_BLOCKS, int KV_ROWS>
struct AttentionTile {
    static constexpr int QK_BYTES = HEAD_DIM_QK * 2;
    static constexpr int VO_BYTES = HEAD_DIM_VO * 2;
    static constexpr int QK_STEPS = HEAD_DIM_QK / 16;
    static constexpr int KV_BLOCKS = KV_ROWS / 8;
    static constexpr int VO_BLOCKS = HEAD_DIM_VO / 8;
    static_assert(HEAD_DIM_QK % 64 == 0 && HEAD_DIM_VO % 64 == 0, "rows are whole 128-byte blocks");
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

    // The variant's logits, where it has any. `index` is that of this lane's row g of block 0 and first key of the tile.
    template <typename Variant>
    PYINFER_DEVICE void transform_scores(const Variant& variant, const ScoreIndex& index) {
        if constexpr (Variant::TRANSFORMS_LOGITS) {
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
                for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const ScoreIndex at{index.request, index.packed_row + m * 16 + i / 2 * 8, index.kv_token + n * 8 + i % 2,
                                            index.kv_head};
                        score[m][n][i] = variant.logits_transform(score[m][n][i], at);
                    }
                }
            }
        }
    }

    // Scores that the row may not see become -inf. `token_of(packed_row)` gives a row's query token.
    template <bool BY_RANGE, typename Variant, typename TokenOf>
    PYINFER_DEVICE void mask_scores(const Variant& variant, const ScoreIndex& index, const RowVisibility& visibility,
                                    const TokenOf& token_of) {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = index.packed_row + m * 16 + h * 8;
                const int token = token_of(row);
                const int begin = visibility.begin(token);
                const uint32_t span = max_of(visibility.end(token) - begin, 0);
                const int first = index.kv_token - begin;
#pragma unroll
                for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        bool visible = !BY_RANGE || static_cast<uint32_t>(first + n * 8 + e) < span;
                        if constexpr (Variant::MASKS) {
                            visible = visible && variant.visible(ScoreIndex{index.request, row, index.kv_token + n * 8 + e, index.kv_head});
                        }
                        score[m][n][2 * h + e] = visible ? score[m][n][2 * h + e] : -infinity();
                    }
                }
            }
        }
    }

    // Softmax of the scores and out += P V. The weights of 16 keys are made just before their mma, so that the special-function unit
    // works on one step while the tensor cores work on the one before. P's accumulators are already the A fragments of the second product.
    PYINFER_DEVICE void accumulate(float scale, uint32_t v_tile) {
        scale = softmax.update(score, out, scale);
        float offset[M_BLOCKS][2];
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
            offset[m][0] = softmax.offset(m, 0);
            offset[m][1] = softmax.offset(m, 1);
        }
        const uint32_t v_lane = v_tile + lane_offset_b_trans<VO_BYTES>();
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
                        w[i] = softmax.weight(s[i], scale, offset[m][i / 2]);
                        softmax.sum[m][i / 2] += w[i];
                    }
                    p[m][2 * half] = pack2<T>(w[0], w[1]);
                    p[m][2 * half + 1] = pack2<T>(w[2], w[3]);
                }
            }
#pragma unroll
            for (int pair = 0; pair < HEAD_DIM_VO / 16; ++pair) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, swizzled_step(v_lane, pair * 16) + step * 16 * VO_BYTES);
#pragma unroll
                for (int m = 0; m < M_BLOCKS; ++m) {
                    mma_m16n8k16<T>(out[m][2 * pair], p[m], b[0], b[1]);
                    mma_m16n8k16<T>(out[m][2 * pair + 1], p[m], b[2], b[3]);
                }
            }
        }
    }
};
