// Floats to 8-bit ones and back.
#pragma once
#include "common/fp8.cuh"
#include "common/types.cuh"

// A float as the byte of type E, by integer arithmetic, for devices without the instruction.
template <typename E>
PYINFER_DEVICE uint32_t fp8_by_bits(float x) {
    constexpr int MANTISSA = is_same_v<E, e4m3> ? 3 : 2, BIAS = is_same_v<E, e4m3> ? 7 : 15, SHIFT = 23 - MANTISSA;
    constexpr uint32_t LARGEST = is_same_v<E, e4m3> ? 0x7e : 0x7b;
    // Adding it moves a subnormal's places to the end of the float's: the addition rounds to nearest even.
    constexpr uint32_t MAGIC = (127 + 24 - BIAS - MANTISSA) << 23;
    const uint32_t magnitude = __float_as_uint(x) & 0x7fffffffu, sign = __float_as_uint(x) >> 24 & 0x80u;
    const uint32_t normal = ((magnitude + ((1u << (SHIFT - 1)) - 1) + (magnitude >> SHIFT & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA);
    const uint32_t small = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(MAGIC)) - MAGIC;
    const uint32_t r = min_of(magnitude < (128u - BIAS) << 23 ? small : normal, LARGEST);
    return magnitude > 0x7f800000u ? 0x7fu : sign | r;
}

// Two floats as type E (e4m3, e5m2), `lo` in the low byte: to nearest even; what lies beyond the largest value, infinities included, becomes that value
// with its sign; NaN stays NaN.
template <typename E>
PYINFER_DEVICE uint32_t pack_fp8x2(float lo, float hi) {
    static_assert(is_same_v<E, e4m3> || is_same_v<E, e5m2>, "pack_fp8x2 makes e4m3 or e5m2");
#if __CUDA_ARCH__ >= 890
    uint16_t r;
    if constexpr (is_same_v<E, e4m3>) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    }
    return r;
#else
    return fp8_by_bits<E>(lo) | fp8_by_bits<E>(hi) << 8;
#endif
}

// Four of type E, lowest byte first, as floats.
template <typename E>
PYINFER_DEVICE void fp8x4_to_floats(uint32_t x, float (&f)[4]) {
    uint32_t lo, hi;
    unpack_fp8x4<f16, E>(x, lo, hi);
    const float2 a = unpack2<f16>(lo), b = unpack2<f16>(hi);
    f[0] = a.x, f[1] = a.y, f[2] = b.x, f[3] = b.y;
}
