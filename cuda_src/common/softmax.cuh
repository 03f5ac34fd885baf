// Online softmax in base 2 over the logits that one warp holds as mma accumulators.
#pragma once
#include "common/ptx_math.cuh"

// Per row (a lane holds rows g and g + 8 of each 16-row block, g = lane / 4) a reference and a sum: everything accumulated so far
// is relative to 2^reference.
//
// The reference follows the running maximum lazily: it moves only when a row exceeds it by RESCALE_THRESHOLD, so nearly all tiles
// skip the rescaling of the output. Weights then reach 2^8, far inside f16, and the final division makes up for it.
// Why not the exact maximum: 4 * VO_BLOCKS multiplications a tile and row block, for the same digits.
//
// NOTE: the exponent is fma(score, scale, -reference), one instruction. For |reference| above 2^24 its rounding is worth whole
// powers of two (2^75 for logits of 1e30); such rows are scaled first, in a branch that ordinary inputs never take. There a logit of
// +inf becomes the largest float, so that inf - inf never arises.
template <int M_BLOCKS>
struct OnlineSoftmax {
    static constexpr float RESCALE_THRESHOLD = 8.0f;
    static constexpr float EXACT_LIMIT = 16777216.0f;
    static constexpr float LARGEST = 3.402823466e38f;
    static constexpr uint32_t ALL_LANES = 0xffffffffu;

    float reference[M_BLOCKS][2];
    float sum[M_BLOCKS][2];  // this lane's columns only, until finish()
    bool huge;               // same in all lanes

    PYINFER_DEVICE void init() {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
            reference[m][0] = reference[m][1] = -infinity();
            sum[m][0] = sum[m][1] = 0.0f;
        }
        huge = false;
    }

    // Takes a tile's scores into the reference and rescales `out` if that moved. Returns the scale for `exponent`.
    template <int KV_BLOCKS, int VO_BLOCKS>
    PYINFER_DEVICE float update(float (&score)[M_BLOCKS][KV_BLOCKS][4], float (&out)[M_BLOCKS][VO_BLOCKS][4], float scale) {
        float highest[M_BLOCKS][2];
        bool grown = false;
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = fmaxf(score[m][0][2 * h], score[m][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < KV_BLOCKS; ++n) {
                    x = fmaxf(x, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                }
                // The four lanes of a quad share a row.
                x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
                x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
                highest[m][h] = fminf(__fmul_rn(x, scale), LARGEST);
                grown |= highest[m][h] > reference[m][h] + RESCALE_THRESHOLD;
            }
        }
        if (__any_sync(ALL_LANES, grown)) {
            bool beyond = false;
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float next = fmaxf(reference[m][h], highest[m][h]);
                    // A row that has seen no key yet stays at -inf: -inf - -inf would be NaN.
                    const float factor = next == -infinity() ? 1.0f : exp2_approx(reference[m][h] - next);
                    reference[m][h] = next;
                    sum[m][h] *= factor;
#pragma unroll
                    for (int d = 0; d < VO_BLOCKS; ++d) {
                        out[m][d][2 * h] *= factor;
                        out[m][d][2 * h + 1] *= factor;
                    }
                    beyond |= next != -infinity() && fabsf(next) > EXACT_LIMIT;
                }
            }
            huge = __any_sync(ALL_LANES, beyond);
        }
        if (huge) {
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
                for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        score[m][n][i] = fminf(__fmul_rn(score[m][n][i], scale), LARGEST);
                    }
                }
            }
            return 1.0f;
        }
        return scale;
    }

    // What `exponent` subtracts. A row without any key yet takes 0: its scores are all -inf and give weights 0.
    PYINFER_DEVICE float offset(int m, int h) const { return reference[m][h] == -infinity() ? 0.0f : -reference[m][h]; }
    PYINFER_DEVICE static float weight(float score, float scale, float offset) { return exp2_approx(fmaf(score, scale, offset)); }

    // Completes the sums over the quad.
    PYINFER_DEVICE void finish() {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                sum[m][h] += __shfl_xor_sync(ALL_LANES, sum[m][h], 1);
                sum[m][h] += __shfl_xor_sync(ALL_LANES, sum[m][h], 2);
            }
        }
    }
};

// log2 of the sum of 2^logit: -inf for a row without a visible key.
PYINFER_DEVICE float log_sum(float reference, float sum) {
    return sum == 0.0f ? -infinity() : reference + log2_approx(sum);
}

// What an accumulated output is multiplied by: 0 for a row without a visible key.
// NOTE: not 1 / sum. A division has a rare path that is a subroutine, and with a call in a loop of a warp-specialised kernel ptxas keeps the descriptors of all
// wgmma products in vector registers (42 R2UR in the main loop of prefill_sm90, 15 % of its speed). The error is one unit in the last place.
PYINFER_DEVICE float normaliser(float sum) {
    return sum == 0.0f ? 0.0f : rcp_approx(sum);
}
