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
