// What Python functions that are linked into a kernel call: `pyinfer_NAME` is the operation `_NAME` of pyinfer/_variant_operations.py.
// They are fast where attention can bear it: errors of a few ulp of float32, results below 2^-126 flushed to zero.
#pragma once
#include "common/ptx_math.cuh"

// 1 / b is an instruction of its own, so that a loop over scores with one divisor takes it once. b beyond 2^126 gives 0.
extern "C" __device__ float pyinfer_divide(float a, float b) {
    return a * rcp_approx(b);
}
// tanh(x / (2 log2 e)) = 1 - 2 / (1 + 2^x), right at both ends: absolute error 2e-7. Why not tanh.approx: its 2^-11, times a cap of 50, is 0.02 in a logit.
extern "C" __device__ float pyinfer_tanh2(float x) {
    return fmaf(-2.0f, rcp_approx(1.0f + exp2_approx(x)), 1.0f);
}
extern "C" __device__ float pyinfer_tanh2_times(float x, float a) {
    return fmaf(-2.0f * a, rcp_approx(1.0f + exp2_approx(x)), a);
}
extern "C" __device__ float pyinfer_exp2(float x) {
    return exp2_approx(x);
}
extern "C" __device__ float pyinfer_log2(float x) {
    return log2_approx(x);
}
extern "C" __device__ float pyinfer_sqrt(float x) {
    return sqrtf(x);
}
extern "C" __device__ float pyinfer_erf(float x) {
    return erff(x);
}
extern "C" __device__ float pyinfer_sin(float x) {
    return sinf(x);
}
extern "C" __device__ float pyinfer_cos(float x) {
    return cosf(x);
}
extern "C" __device__ float pyinfer_floor(float x) {
    return floorf(x);
}
extern "C" __device__ float pyinfer_ceil(float x) {
    return ceilf(x);
}
extern "C" __device__ float pyinfer_power(float a, float b) {
    return powf(a, b);
}
