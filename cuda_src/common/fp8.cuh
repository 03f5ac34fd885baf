// 8-bit floats to 16-bit ones, four at a time. Every e4m3 and e5m2 value is exact in f16 and in bf16.
#pragma once
#include "common/types.cuh"

// Two e4m3 (the low 16 bits of `x`) as a packed pair of T, the lower byte in the low half; NaN stays NaN. By integer arithmetic, for
// devices without the instruction: sign and magnitude at T's places are the value times a power of two, subnormals included.
template <typename T>
PYINFER_DEVICE uint32_t e4m3x2_by_bits(uint32_t x) {
    const uint32_t spread = __byte_perm(x, 0, 0x1404);
    const uint32_t magnitude = spread & 0x7f007f00u;
    uint32_t r;
    if constexpr (is_same_v<T, f16>) {
        const uint32_t small = (spread & 0x80008000u) | (magnitude >> 1);
        asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(small), "r"(0x5c005c00u));  // 2^8
    } else {
        const uint32_t small = (spread & 0x80008000u) | (magnitude >> 4);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120, and -0, which changes nothing
    }
    const uint32_t nan = (magnitude + 0x01000100u) & 0x80008000u;  // only the magnitude 0x7f reaches the sign's place
    return r | (nan - (nan >> 15));
}

// The same with the instruction of sm_89.
PYINFER_DEVICE uint32_t e4m3x2_to_f16x2(uint32_t x) {
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(x)));
    return r;
}

PYINFER_DEVICE uint32_t f16x2_to_bf16x2(uint32_t x) {
    const float2 f = unpack2<f16>(x);
    return pack2<bf16>(f.x, f.y);
}

// Four of type E (e4m3, e5m2), lowest byte first, as two packed pairs of T (f16, bf16).
template <typename T, typename E>
PYINFER_DEVICE void unpack_fp8x4(uint32_t x, uint32_t& lo, uint32_t& hi) {
    static_assert(is_same_v<E, e4m3> || is_same_v<E, e5m2>, "unpack_fp8x4 takes e4m3 or e5m2");
    if constexpr (is_same_v<E, e5m2>) {
        // e5m2 is the upper byte of f16.
        lo = __byte_perm(x, 0, 0x1404);
        hi = __byte_perm(x, 0, 0x3424);
    } else {
#if __CUDA_ARCH__ >= 890
        lo = e4m3x2_to_f16x2(x & 0xffffu);
        hi = e4m3x2_to_f16x2(x >> 16);
#else
        lo = e4m3x2_by_bits<T>(x & 0xffffu);
        hi = e4m3x2_by_bits<T>(x >> 16);
        return;
#endif
    }
    if constexpr (is_same_v<T, bf16>) {
        lo = f16x2_to_bf16x2(lo);
        hi = f16x2_to_bf16x2(hi);
    }
}
