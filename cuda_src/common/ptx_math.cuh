// Special-function instructions: one function each. Errors as the PTX guide states them.
#pragma once
#include "common/types.cuh"

// 2^x to 2 ulp; -inf gives 0. Subnormal results are flushed to zero.
PYINFER_DEVICE float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// log2(x) to 2^-22 absolute near 1, else 2 ulp; 0 gives -inf.
PYINFER_DEVICE float log2_approx(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / x to 1 ulp; infinity gives 0.
PYINFER_DEVICE float rcp_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / sqrt(x) to 2^-22.9 relative; 0 gives infinity.
PYINFER_DEVICE float rsqrt_approx(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// sin(x) and cos(x), x in radians: absolute error 2^-20.5 for |x| <= pi, growing beyond; reduce the angle first.
PYINFER_DEVICE float sin_approx(float x) {
    float r;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PYINFER_DEVICE float cos_approx(float x) {
    float r;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
