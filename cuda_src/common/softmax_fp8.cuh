// Online softmax over wgmma accumulators whose weights become e4m3, the left operand of the product with the values.
//
// e4m3 has its full precision from 2^-6 to 448. So a row's reference lies ROOM below its highest score, whose weight is then 2^8 = 256, and all down to 2^-14 of
// that have their four digits. All else (sums, LSE, the merge of splits) is relative to 2^reference as ever.
// Why the reference follows every new maximum here, not lazily as in softmax.cuh: a power of two is exact. A lagging reference would round the weight of a key
// that decides a row, while the row's sum has it exactly: twice the error for scores with a deviation of 3.
#pragma once
#include "common/ptx_fp8.cuh"
#include "common/softmax.cuh"

struct Fp8Softmax : OnlineSoftmax<1> {
    static constexpr float ROOM = RESCALE_THRESHOLD;
    bool moved;  // the reference moved in the latest advance(); same in all lanes

    // Takes a tile's scores, which a row's `scale` turns into logits in base 2, into the reference, and says by what the output is to be scaled.
    template <int KV_BLOCKS>
    PYINFER_DEVICE void advance(float (&score)[KV_BLOCKS][4], float (&scale)[2], float (&factor)[2]) {
        if (!(scale[0] > 0.0f && scale[1] > 0.0f)) {  // the maximum is taken before scaling
            multiply(score, scale);
            scale[0] = scale[1] = 1.0f;
        }
        float highest[2];
        bool grown = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x = fmaxf(score[0][2 * h], score[0][2 * h + 1]);
#pragma unroll
            for (int n = 1; n < KV_BLOCKS; ++n) {
                x = fmaxf(x, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
            }
            x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));  // the four lanes of a quad share a row
            x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
            highest[h] = fminf(__fmul_rn(x, scale[h]), LARGEST);
            grown |= highest[h] > reference[0][h] + RESCALE_THRESHOLD;
        }
        moved = __any_sync(ALL_LANES, grown);
        factor[0] = factor[1] = 1.0f;
        if (moved) {
            bool beyond = false;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float next = fmaxf(reference[0][h], highest[h] - ROOM);
                factor[h] = next == -infinity() ? 1.0f : exp2_approx(reference[0][h] - next);
                reference[0][h] = next;
                sum[0][h] *= factor[h];
                beyond |= next != -infinity() && fabsf(next) > EXACT_LIMIT;
            }
            huge = __any_sync(ALL_LANES, beyond);
        }
        if (huge) {
            multiply(score, scale);
            scale[0] = scale[1] = 1.0f;
#pragma unroll
            for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[n][i] = fminf(score[n][i], LARGEST);
                }
            }
        }
    }

    // Scores -> weights relative to 2^reference, in place, and their sums.
    template <int KV_BLOCKS>
    PYINFER_DEVICE void make_weights(float (&score)[KV_BLOCKS][4], const float (&scale)[2]) {
        const float offsets[2] = {offset(0, 0), offset(0, 1)};
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = weight(score[n][i], scale[i / 2], offsets[i / 2]);
                sum[0][i / 2] += score[n][i];
            }
        }
    }

    // Weights as the operand of the product: a word of a lane holds those of keys 2t, 2t + 1, 2t + 8, 2t + 9 of 16 (t = lane % 4), as the accumulators lie.
    // The values' keys are in that order too (common/transpose_fp8.cuh).
    template <int KV_BLOCKS>
    PYINFER_DEVICE static void pack(const float (&weight)[KV_BLOCKS][4], uint32_t (&packed)[KV_BLOCKS / 4][4]) {
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; n += 2) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                packed[n / 4][n % 4 + h] = pack_e4m3x4(weight[n][2 * h], weight[n][2 * h + 1], weight[n + 1][2 * h], weight[n + 1][2 * h + 1]);
            }
        }
    }

    template <int VO_BLOCKS>
    PYINFER_DEVICE void rescale(float (&out)[VO_BLOCKS][4], const float (&factor)[2]) const {
        if (moved) {
#pragma unroll
            for (int d = 0; d < VO_BLOCKS; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[d][i] *= factor[i / 2];
                }
            }
        }
    }

    // Scores times the rows' scales.
    template <int KV_BLOCKS>
    PYINFER_DEVICE static void multiply(float (&score)[KV_BLOCKS][4], const float (&scale)[2]) {
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = __fmul_rn(score[n][i], scale[i / 2]);
            }
        }
    }
};
