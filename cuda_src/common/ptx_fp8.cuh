// Instructions for 8-bit floats (sm_90): one function each.
#pragma once
#include "common/types.cuh"

// Four floats as e4m3 bytes, the first lowest: to nearest even, what lies beyond +-448 becomes that.
// NOTE: written as one statement, the second conversion merges into the first one's register instead of needing a permutation.
PYINFER_DEVICE uint32_t pack_e4m3x4(float a, float b, float c, float d) {
    uint32_t r;
    asm("{\n.reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};\n}\n"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
}
