// Scales of 8-bit results: a stored value times its scale is the value.
#pragma once
#include "common/fp8_pack.cuh"
#include "common/ptx_math.cuh"
#include "common/reduce.cuh"

template <typename E>
struct fp8_limits;
template <>
struct fp8_limits<e4m3> {
    static constexpr float MAX = 448.0f;
};
template <>
struct fp8_limits<e5m2> {
    static constexpr float MAX = 57344.0f;
};

// A row's own scale: its largest magnitude becomes the largest value of E. The floor keeps rows of zeros from dividing by zero; NaN stays NaN.
template <typename E>
PYINFER_DEVICE float scale_of_row(float largest) {
    return max_nan(largest * (1.0f / fp8_limits<E>::MAX), 1e-12f);
}

// A given scale: one float in memory (written by the kernel before, so only after pdl_wait), or by value if there is no address.
PYINFER_DEVICE float given_scale(const float* address, float value) {
    return address ? *address : value;
}
