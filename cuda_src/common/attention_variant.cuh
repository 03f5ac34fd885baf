// What makes one attention differ from another: a *variant* is a small struct of inlined functions that decode and prefill, on
// every architecture, call at the same places.
//
//   TRANSFORMS_LOGITS, logits_transform   raw score q·k -> logit in base 2; without it the score is multiplied by `scale`
//   MASKS, visible                        a mask beyond the range of keys that `RowVisibility` gives
//   scale                                 base-2 exponent per unit of (transformed) score
//   output_transform                      applied to the normalised output, where it is written
//
// A variant that needs the place of a score gets it as a `ScoreIndex`; what it does not read costs nothing.
#pragma once
#include "common/ptx_math.cuh"

struct ScoreIndex {
    int request;
    int packed_row;  // within the request: query token = packed_row / group, head = kv_head * group + packed_row % group
    int kv_token;
    int kv_head;
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

// softmax(sm_scale * q·k) v. Causality and sliding windows are RowVisibility's.
template <typename Params>
struct PlainVariant {
    static constexpr bool TRANSFORMS_LOGITS = false;
    static constexpr bool MASKS = false;
    float scale;
    float v_scale;

    PYINFER_DEVICE explicit PlainVariant(const Params& p) : scale(p.logit_scale), v_scale(p.v_scale) {}
    PYINFER_DEVICE float logits_transform(float score, const ScoreIndex&) const { return score; }
    PYINFER_DEVICE bool visible(const ScoreIndex&) const { return true; }
    PYINFER_DEVICE float output_transform(float value) const { return value * v_scale; }
};

// Logits capped as cap * tanh(sm_scale * q·k / cap). The host folds base 2 into both constants:
// logit_scale = 2 log2(e) sm_scale / cap, soft_cap_log2 = log2(e) cap.
// Why not tanh.approx: its error of 2^-11, times a cap of 50, is 0.02 in a logit; this form errs by 1e-7 of the cap.
template <typename Params>
struct SoftCapVariant {
    static constexpr bool TRANSFORMS_LOGITS = true;
    static constexpr bool MASKS = false;
    float scale = 1.0f;
    float rate;
    float cap;
    float v_scale;

    PYINFER_DEVICE explicit SoftCapVariant(const Params& p) : rate(p.logit_scale), cap(p.soft_cap_log2), v_scale(p.v_scale) {}
    PYINFER_DEVICE float logits_transform(float score, const ScoreIndex&) const {
        // tanh(x) = 1 - 2 / (1 + e^2x): right at both ends, where e^2x is 0 or infinity.
        return cap - 2.0f * cap * rcp_approx(1.0f + exp2_approx(score * rate));
    }
    PYINFER_DEVICE bool visible(const ScoreIndex&) const { return true; }
    PYINFER_DEVICE float output_transform(float value) const { return value * v_scale; }
};
