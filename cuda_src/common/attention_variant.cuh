// What makes one attention differ from another. Decode and prefill, on every architecture, call a *variant* at the same places:
//
//   query               an element of q, before anything is made of it (if TRANSFORMS_QUERY)
//   row                 what the variant knows about a query row, made once for each tile of keys
//   logits              raw score q·k -> logit in base 2; without TRANSFORMS_LOGITS the score is multiplied by `scale`
//   visible             a mask beyond the range of keys that `RowVisibility` gives (if MASKS)
//   sink                a logit that joins a row's denominator (if SINKS)
//   output_transform    applied to the normalised output, where it is written
//
// Without SOFTMAX the logits, in natural units, are the weights: out = sum_j logit_j v_j, nothing is normalised and there is no LSE.
//
// The built-in ones are one template over a set of FEATURES; what a kernel does not ask for costs nothing, neither registers nor fields
// of its parameter struct. RoPE is not here: it changes operands, not scores (common/attention_rope.cuh).
//
// A user's source stands in front of the kernel, behind `Params`, and defines the hooks that FEATURES names (p holds its own fields too):
//   float user_query_transform(const Params& p, float value, const VariantPlace& at, int column)      an element of q; the result is rounded to q's type
//   float user_logits_transform(const Params& p, float logit, const VariantPlace& at)
//       natural-log logit, scaled and with ALiBi's bias but not capped, to the same. With USER_RAW: scaled only (by 1, if nobody asked), to base 2
//   bool user_mask(const Params& p, const VariantPlace& at)
//   float user_output_transform(const Params& p, float value, const VariantPlace& at, int column)
#pragma once
#include "common/attention_work.cuh"
#include "common/ptx_math.cuh"
#include "common/swizzle.cuh"

namespace attention_feature {
constexpr uint32_t SOFT_CAP = 1;
constexpr uint32_t ALIBI = 2;
constexpr uint32_t CUSTOM_MASK = 4;
constexpr uint32_t MULTI_ITEM = 8;
constexpr uint32_t SINK = 16;
constexpr uint32_t USER_LOGITS = 32;
constexpr uint32_t USER_MASK = 64;
constexpr uint32_t USER_OUTPUT = 128;
constexpr uint32_t USER_QUERY = 256;
constexpr uint32_t NO_SOFTMAX = 512;
constexpr uint32_t USER_RAW = 1024;
}  // namespace attention_feature

// Where a user's function is asked. Both tokens count within the request and are always inside; kv_token is 0 where there is no key.
struct VariantPlace {
    int request, q_token, kv_token, qo_head, kv_head;
    int diagonal;  // kv_len - qo_len

    PYINFER_DEVICE int q_position() const { return diagonal + q_token; }  // the key that the query token stands over
};

// The keys a query token sees by causality, window and length: [begin(token), end(token)), which may be empty or inverted.
struct RowVisibility {
    int diagonal;     // kv_len - qo_len: token i stands over key diagonal + i
    int kv_end;       // no key from here on (end of the work item)
    int window_left;  // keys to the left of the diagonal that stay visible; negative: all
    bool causal;

    PYINFER_DEVICE int begin(int token) const { return window_left >= 0 ? diagonal + token - window_left : 0; }
    PYINFER_DEVICE int end(int token) const { return causal ? min_of(kv_end, diagonal + token + 1) : kv_end; }
};

// kv_len of a request: an array in a plan's parameters, a number in a single request's.
PYINFER_DEVICE int length_of(const int32_t* lengths, int request) {
    return lengths[request];
}
PYINFER_DEVICE int length_of(int length, int) {
    return length;
}

// Keys and queries of a place's request.
template <typename Params>
PYINFER_DEVICE int kv_length(const Params& p, const VariantPlace& at) {
    return length_of(p.kv_len, at.request);
}
template <typename Params>
PYINFER_DEVICE auto query_length(const Params& p, int request) -> decltype(p.qo_len) {
    return p.qo_len;
}
template <typename Params>
PYINFER_DEVICE auto query_length(const Params& p, int request) -> decltype(p.qo_indptr[0] - 0) {
    return p.qo_indptr[request + 1] - p.qo_indptr[request];
}
template <typename Params>
PYINFER_DEVICE int qo_length(const Params& p, const VariantPlace& at) {
    return length_of(p.kv_len, at.request) - at.diagonal;
}

// after * user_logits_transform(before * score). A source may define it for its own Params, which then is the better match: functions
// that are linked in multiply for themselves, where the products of what is the same for all scores are made once.
template <typename Params>
PYINFER_DEVICE float user_scaled_logits(const Params& p, float score, float before, float after, const VariantPlace& at) {
    return user_logits_transform(p, score * before, at) * after;
}

// ALiBi's slope of a head (Press et al., arXiv 2108.12409): 2^(-8k/n), k = 1..n, for the first n = 2^floor(log2 heads) heads, and
// 2^(-4k/n), k = 1, 3, 5, ..., for the rest.
PYINFER_DEVICE float alibi_slope(int head, int num_heads) {
    const int n = 1 << (31 - __clz(num_heads));
    const float exponent = head < n ? -8.0f * (head + 1) : -4.0f * (2 * (head - n) + 1);
    return exp2_approx(exponent / n);
}

// softmax(f(sm_scale * q·k)) v. The host folds base 2 into the constants: logit_scale = log2(e) sm_scale, or with a soft cap
// 2 log2(e) sm_scale / cap, the exponent of cap * tanh(x / cap) = cap - 2 cap / (1 + e^(2x / cap)); soft_cap_log2 = log2(e) cap.
// Why not tanh.approx: its error of 2^-11, times a cap of 50, is 0.02 in a logit; this form errs by 1e-7 of the cap.
template <typename Params, uint32_t FEATURES>
struct AttentionVariant {
    // The set, one constant a feature.
    static constexpr bool CAPS = FEATURES & attention_feature::SOFT_CAP;
    static constexpr bool BIASES = FEATURES & attention_feature::ALIBI;
    static constexpr bool HAS_BITS = FEATURES & attention_feature::CUSTOM_MASK;
    static constexpr bool HAS_ITEMS = FEATURES & attention_feature::MULTI_ITEM;
    static constexpr bool SINKS = FEATURES & attention_feature::SINK;
    static constexpr bool CALLS_LOGITS = FEATURES & attention_feature::USER_LOGITS;
    static constexpr bool CALLS_MASK = FEATURES & attention_feature::USER_MASK;
    static constexpr bool CALLS_OUTPUT = FEATURES & attention_feature::USER_OUTPUT;

    static constexpr bool RAW_SCORES = FEATURES & attention_feature::USER_RAW;
    static constexpr bool SOFTMAX = !(FEATURES & attention_feature::NO_SOFTMAX);
    static constexpr bool TRANSFORMS_QUERY = FEATURES & attention_feature::USER_QUERY;

    static constexpr bool TRANSFORMS_LOGITS = CAPS || BIASES || CALLS_LOGITS || !SOFTMAX;
    static constexpr bool MASKS = HAS_BITS || HAS_ITEMS || CALLS_MASK;
    static constexpr bool NEEDS_ROW = BIASES || CALLS_LOGITS || MASKS;

    const Params& p;
    float scale;  // base-2 exponent per unit of (transformed) score
    float v_scale;

    PYINFER_DEVICE explicit AttentionVariant(const Params& params) : p(params), scale(TRANSFORMS_LOGITS ? 1.0f : params.logit_scale), v_scale(params.v_scale) {}

    struct Row {
        int request, q_token, qo_head, kv_head, last_key, diagonal;
        float slope;            // ALiBi's, per key, in the units of logit_scale
        const uint8_t* bits;    // the row's mask begins at bit `first_bit` of this byte
        uint32_t first_bit;
        uint32_t prefix;        // multi-item: keys before it are visible, and those from item_begin on
        int item_begin;

        PYINFER_DEVICE VariantPlace at(int kv_token) const { return {request, q_token, kv_token, qo_head, kv_head, diagonal}; }
    };

    // `packed_row` may lie behind the tile's last row, which then stands for it: no tensor is read outside.
    PYINFER_DEVICE Row row(const AttentionWork& w, int packed_row) const {
        Row r;
        if constexpr (NEEDS_ROW) {
            const int packed = min_of(packed_row, w.row_begin + w.row_count - 1);
            r.request = w.request;
            r.q_token = fast_divide(packed, p.group_magic, p.group_shift);
            r.kv_head = w.kv_head;
            r.qo_head = w.kv_head * p.group + packed - r.q_token * p.group;
            r.last_key = w.kv_end - 1;
            r.diagonal = w.diagonal;
            if constexpr (BIASES) {
                r.slope = alibi_slope(r.qo_head, p.num_kv_heads * p.group) * bias_scale();
            }
            if constexpr (HAS_BITS) {
                const int64_t bit = static_cast<int64_t>(r.q_token) * length_of(p.kv_len, w.request);
                r.bits = p.mask + (p.mask_indptr != nullptr ? p.mask_indptr[w.request] : 0) + (bit >> 3);
                r.first_bit = bit & 7;
            }
            if constexpr (HAS_ITEMS) {
                // q_abs < j + position, or j < prefix. Queries inside the prefix see what causality leaves.
                const int q_abs = w.diagonal + r.q_token;
                r.prefix = p.prefix_len[w.request];
                const int within = q_abs - static_cast<int>(r.prefix);
                r.item_begin = 0;
                if (within >= 0) {
                    const int position = within < p.token_pos_len ? p.token_pos[static_cast<int64_t>(w.request) * p.token_pos_len + within] : 0;
                    r.item_begin = q_abs - position + 1;
                }
            }
        }
        return r;
    }

    // logit_scale's units, base 2 or those of the soft cap, per unit of a natural logit; and the inverse.
    PYINFER_DEVICE float bias_scale() const {
        if constexpr (CAPS) {
            return 2.0f * LOG2_E * LOG2_E / p.soft_cap_log2;
        }
        return LOG2_E;
    }
    PYINFER_DEVICE float natural_scale() const {
        if constexpr (CAPS) {
            return p.soft_cap_log2 * (0.5f / (LOG2_E * LOG2_E));
        }
        return 1.0f / LOG2_E;
    }

    // What hides a key: a logit, or without softmax a weight.
    PYINFER_DEVICE static float hidden() { return SOFTMAX ? -infinity() : 0.0f; }

    PYINFER_DEVICE float query(float value, const AttentionWork& w, int q_token, int qo_head, int column) const {
        return user_query_transform(p, value, VariantPlace{w.request, q_token, 0, qo_head, w.kv_head, w.diagonal}, column);
    }

    PYINFER_DEVICE float logits(float score, const Row& r, int kv_token) const {
        if constexpr (CALLS_LOGITS && RAW_SCORES) {
            const float logit = user_logits_transform(p, score * (p.logit_scale * natural_scale()), r.at(min_of(kv_token, r.last_key)));
            return SOFTMAX ? logit : logit * (1.0f / LOG2_E);
        }
        float x;
        if constexpr (CALLS_LOGITS && !BIASES) {
            x = user_scaled_logits(p, score, p.logit_scale * natural_scale(), bias_scale(), r.at(min_of(kv_token, r.last_key)));
        } else {
            x = score * p.logit_scale;
            if constexpr (BIASES) {
                x = fmaf(r.slope, static_cast<float>(kv_token - r.q_token), x);
            }
            if constexpr (CALLS_LOGITS) {
                x = user_scaled_logits(p, x, natural_scale(), bias_scale(), r.at(min_of(kv_token, r.last_key)));
            }
        }
        if constexpr (CAPS) {
            // Right at both ends, where e^2x is 0 or infinity.
            x = p.soft_cap_log2 - 2.0f * p.soft_cap_log2 * rcp_approx(1.0f + exp2_approx(x));
        }
        if constexpr (!SOFTMAX) {
            x *= 1.0f / LOG2_E;
        }
        return x;
    }

    // Asked only for keys that RowVisibility shows, so inside the request.
    PYINFER_DEVICE bool visible(const Row& r, int kv_token) const {
        bool result = true;
        if constexpr (HAS_BITS) {
            const uint32_t bit = r.first_bit + kv_token;
            result = result && (r.bits[bit >> 3] >> (bit & 7) & 1);
        }
        if constexpr (HAS_ITEMS) {
            result = result && (static_cast<uint32_t>(kv_token) < r.prefix || kv_token >= r.item_begin);
        }
        if constexpr (CALLS_MASK) {
            result = result && user_mask(p, r.at(kv_token));
        }
        return result;
    }

    // Base-2 logit. A sink of +inf counts as the largest float, as scores do.
    PYINFER_DEVICE float sink(int qo_head) const { return fminf(p.sinks[qo_head] * LOG2_E, 3.402823466e38f); }

    // `row_of()` gives the OutputRow, if a user's function asks for it.
    template <typename RowOf>
    PYINFER_DEVICE float output_transform(float value, const AttentionWork& w, const RowOf& row_of, int column) const {
        value *= v_scale;
        if constexpr (CALLS_OUTPUT) {
            const auto at = row_of();
            value =
                user_output_transform(p, value, VariantPlace{w.request, static_cast<int>(at.token) - w.qo_begin, 0, at.head, w.kv_head, w.diagonal}, column);
        }
        return value;
    }
};

// One warp's ROWS rows of queries in a swizzled tile, through the variant. `first_row` is the tile's row of the first; rows behind the item's last are left.
template <typename T, int HEAD_DIM, int ROW_BYTES, int ROWS, typename Variant>
PYINFER_DEVICE void transform_queries(char* tile, const Variant& variant, const AttentionWork& w, int first_row) {
    constexpr int PAIRS = HEAD_DIM / 2;
#pragma unroll 1
    for (int task = threadIdx.x % 32; task < ROWS * PAIRS; task += 32) {
        const int row = task / PAIRS;
        const int column = task % PAIRS * 2;
        if (first_row + row < w.row_count) {
            const int packed = w.row_begin + first_row + row;
            const int q_token = fast_divide(packed, variant.p.group_magic, variant.p.group_shift);
            const int head = w.kv_head * variant.p.group + packed - q_token * variant.p.group;
            uint32_t& pair = *reinterpret_cast<uint32_t*>(tile + swizzled_offset<ROW_BYTES>(row, column / 8) + column % 8 * 2);
            const float2 x = unpack2<T>(pair);
            pair = pack2<T>(variant.query(x.x, w, q_token, head, column), variant.query(x.y, w, q_token, head, column + 1));
        }
    }
}
