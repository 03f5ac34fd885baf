// What a variant written for FlashInfer refers to: a struct derived from AttentionVariantBase, its functions declared by REGISTER_ macros.
// jit/customize.py generates the hooks of common/attention_variant.cuh that call it.
#pragma once
#include "common/attention_variant.cuh"

// Names by which such a struct reaches the special functions.
namespace math {
constexpr float log2e = LOG2_E;
constexpr float loge2 = 0.6931471805599453f;
constexpr float inf = 5e4f;
PYINFER_DEVICE float ptx_exp2(float x) {
    return exp2_approx(x);
}
PYINFER_DEVICE float ptx_log2(float x) {
    return log2_approx(x);
}
PYINFER_DEVICE float ptx_rcp(float x) {
    return rcp_approx(x);
}
PYINFER_DEVICE float rsqrt(float x) {
    return rsqrt_approx(x);
}
PYINFER_DEVICE float tanh(float x) {
    return 1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(x * (2.0f * LOG2_E)));
}
}  // namespace math

#define REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, ...)                                      \
    template <typename Params, typename T>                                                                                                       \
    PYINFER_DEVICE T LogitsTransform(const Params& params, T logits, uint32_t batch_idx, uint32_t qo_idx, uint32_t kv_idx, uint32_t qo_head_idx, \
                                     uint32_t kv_head_idx) const {                                                                               \
        __VA_ARGS__                                                                                                                              \
    }
#define REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, ...)                                                             \
    template <typename Params>                                                                                                                             \
    PYINFER_DEVICE bool LogitsMask(const Params& params, uint32_t batch_idx, uint32_t qo_idx, uint32_t kv_idx, uint32_t qo_head_idx, uint32_t kv_head_idx) \
        const {                                                                                                                                            \
        __VA_ARGS__                                                                                                                                        \
    }

struct AttentionVariantBase {
    static constexpr bool use_softmax = true;
    REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, { return logits; })
    REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, { return true; })
};

// Of a logit in the struct's own units, the base-2 exponent: with a softmax it has a scale, without one weights are taken as they are.
template <bool SOFTMAX, typename Variant>
PYINFER_DEVICE float flashinfer_logit(const Variant& variant, float logit) {
    if constexpr (SOFTMAX) {
        return logit * variant.sm_scale_log2;
    } else {
        return logit * LOG2_E;
    }
}
