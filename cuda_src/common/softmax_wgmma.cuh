// Online softmax over wgmma accumulators: one block of 16 rows a warp, the output still being accumulated while the scores are looked at. So what
// `OnlineSoftmax::update` does in one step is taken apart here: scores first (`advance`, `make_weights`), the output later (`rescale`).
#pragma once
#include "common/attention_variant.cuh"
#include "common/softmax.cuh"

struct WgmmaSoftmax : OnlineSoftmax<1> {
    bool moved;  // the reference moved in the latest advance(); same in all lanes

    // Takes a tile's scores into the reference, scales the sums and says by what the output is to be scaled. Returns the scale for the exponent.
    template <int KV_BLOCKS>
    PYINFER_DEVICE float advance(float (&score)[KV_BLOCKS][4], float scale, float (&factor)[2]) {
        float highest[2];
        bool grown = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x = fmaxf(score[0][2 * h], score[0][2 * h + 1]);
#pragma unroll
            for (int n = 1; n < KV_BLOCKS; ++n) {
                x = fmaxf(x, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
            }
            highest[h] = fminf(__fmul_rn(x, scale), LARGEST);
            grown |= highest[h] > reference[0][h] + RESCALE_THRESHOLD;
        }
        moved = __any_sync(ALL_LANES, grown);
        factor[0] = factor[1] = 1.0f;
        if (moved) {  // rarely: only then do the four lanes of a quad, which share a row, compare
            bool beyond = false;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(ALL_LANES, highest[h], 1));
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(ALL_LANES, highest[h], 2));
                const float next = fmaxf(reference[0][h], highest[h]);
                factor[h] = next == -infinity() ? 1.0f : exp2_approx(reference[0][h] - next);
                reference[0][h] = next;
                sum[0][h] *= factor[h];
                beyond |= next != -infinity() && fabsf(next) > EXACT_LIMIT;
            }
            huge = __any_sync(ALL_LANES, beyond);
        }
        if (huge) {
#pragma unroll
            for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[n][i] = fminf(__fmul_rn(score[n][i], scale), LARGEST);
                }
            }
            return 1.0f;
        }
        return scale;
    }

    // Scores -> weights relative to 2^reference, in place, and their sums.
    template <int KV_BLOCKS>
    PYINFER_DEVICE void make_weights(float (&score)[KV_BLOCKS][4], float scale) {
        const float offsets[2] = {offset(0, 0), offset(0, 1)};
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = weight(score[n][i], scale, offsets[i / 2]);
                sum[0][i / 2] += score[n][i];
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
};

// The softmax takes the maximum before it scales, so a scale that is not positive is applied here. Returns the scale left to apply.
template <int KV_BLOCKS>
PYINFER_DEVICE float make_scale_positive(float (&score)[KV_BLOCKS][4], float scale) {
    if (scale > 0.0f) {
        return scale;
    }
#pragma unroll
    for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            score[n][i] *= scale;
        }
    }
    return 1.0f;
}

// The variant's logits, where it has any. `packed_row` and `kv_token` are this lane's first row and its first key of the tile.
template <int KV_BLOCKS, typename Variant>
PYINFER_DEVICE void transform_scores(float (&score)[KV_BLOCKS][4], const Variant& variant, const AttentionWork& w, int packed_row, int kv_token) {
    if constexpr (Variant::TRANSFORMS_LOGITS) {
        const typename Variant::Row rows[2] = {variant.row(w, packed_row), variant.row(w, packed_row + 8)};
#pragma unroll
        for (int n = 0; n < KV_BLOCKS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = variant.logits(score[n][i], rows[i / 2], kv_token + n * 8 + i % 2);
            }
        }
    }
}

// Scores that the row may not see, and those before the work item's first key, become -inf. `token_of(packed_row)` gives a row's query token.
template <int KV_BLOCKS, typename Variant, typename TokenOf>
PYINFER_DEVICE void mask_scores(float (&score)[KV_BLOCKS][4], const Variant& variant, const AttentionWork& w, int packed_row, int kv_token,
                                const RowVisibility& visibility, const TokenOf& token_of) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = packed_row + h * 8;
        const int token = token_of(row);
        const int begin = max_of(visibility.begin(token), w.kv_begin);
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
                score[n][2 * h + e] = visible ? score[n][2 * h + e] : -infinity();
            }
        }
    }
}
