// Masses: probabilities as integers, so that a sum does not depend on its order. Every kernel of this folder, and pyinfer/cpu/sampling.py, count in
// units of 2^-s: mass(p) = ceil(p * 2^s). Rounding up gives every positive p at least one unit: what can be kept can be drawn. The error of a
// sum is below 2^18 units, 2^-26 of a normalised row.
#pragma once

#include "common/types.cuh"

constexpr uint64_t UNLIMITED = 0x7fffffffffffffffull;
constexpr int SCALE_BITS = 44;
constexpr uint32_t INF_BITS = 0x7f800000u;

// A key orders values: the bits of a probability.
constexpr uint32_t LOWEST_KEY = 1u;  // of the smallest positive float

// Keeps value x iff count(> x) < k and mass(> x) < limit.
struct Filter {
    uint64_t k;
    uint64_t limit;

    PYINFER_DEVICE bool accepts(uint64_t count_above, uint64_t mass_above) const { return count_above < k && mass_above < limit; }
};

// s: 44 for a row of probabilities (largest value in [2^-19, 2)), else what brings the largest value into [2^44, 2^45).
PYINFER_DEVICE int scale_exponent(uint32_t max_bits) {
    const int exponent = max_of(static_cast<int>(max_bits >> 23), 1);
    return exponent >= 108 && exponent <= 127 ? SCALE_BITS : SCALE_BITS + 127 - exponent;
}

// mass(p) = digits << shift, digits below 2^24; the shift depends on p's exponent only.
struct Mass {
    uint32_t digits;
    int shift;

    PYINFER_DEVICE uint64_t units() const { return static_cast<uint64_t>(digits) << shift; }
};

PYINFER_DEVICE int mass_shift(uint32_t bits, int s) {
    return max_of(max_of(static_cast<int>(bits >> 23), 1) - 150 + s, 0);
}

PYINFER_DEVICE Mass mass_of(uint32_t bits, int s) {
    const int exponent = static_cast<int>(bits >> 23);
    const uint32_t mantissa = (bits & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0u);
    const int shift = max_of(exponent, 1) - 150 + s;
    const int down = min_of(max_of(-shift, 0), 24);  // at 24, any positive mantissa becomes one unit
    return Mass{(mantissa + ((1u << down) - 1u)) >> down, max_of(shift, 0)};
}

// A thread's sum of masses. Where double precision is fast, an element costs one FMA: from 2^8 to 2^9 a double's last bit is 2^-44, so that adding the
// value and rounding up adds its mass. close() empties the double into the integer, at least once every 64 elements (each weighs less than 2^45 units).
struct MassSum {
    uint64_t units = 0;
    int s;
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
    static constexpr uint64_t EMPTY = 0x4070000000000000ull;  // the bits of 2^8
    double open, scale;

    PYINFER_DEVICE explicit MassSum(int s) : s(s), open(256.0), scale(__longlong_as_double(static_cast<int64_t>(s - SCALE_BITS + 1023) << 52)) {}
    PYINFER_DEVICE void add(uint32_t bits) { open = __fma_ru(static_cast<double>(__uint_as_float(bits)), scale, open); }
    PYINFER_DEVICE void close() {
        units += static_cast<uint64_t>(__double_as_longlong(open)) - EMPTY;
        open = 256.0;
    }
#else
    PYINFER_DEVICE explicit MassSum(int s) : s(s) {}
    PYINFER_DEVICE void add(uint32_t bits) { units += mass_of(bits, s).units(); }
    PYINFER_DEVICE void close() {}
#endif
};

PYINFER_DEVICE float power_of_two(int n) {  // -126 <= n <= 127
    return __int_as_float((n + 127) << 23);
}

// mass * 2^-s, in two exact steps because 2^-s itself may not be a float.
PYINFER_DEVICE float mass_to_float(uint64_t mass, int s) {
    const int half = s >> 1;
    return __fmul_rn(__fmul_rn(__ull2float_rn(mass), power_of_two(-half)), power_of_two(half - s));
}

// The mass limit of top_p in units of 2^-s: at least 1 (the most probable tokens are always kept), unlimited from 1.0 on and for NaN.
PYINFER_DEVICE uint64_t top_p_units(float top_p, int s) {
    if (!(top_p < 1.f)) {
        return UNLIMITED;
    }
    const uint32_t bits = top_p > 0.f ? __float_as_uint(top_p) : 0u;
    if (mass_shift(bits, s) >= 40) {  // 2^63 units or more: no row weighs that (possible only where s > 44)
        return UNLIMITED;
    }
    return max_of(mass_of(bits, s).units(), uint64_t{1});
}

// ceil(top_p * mass), exactly: top_p is a 24-bit integer m times 2^-e, and m * mass needs up to 87 bits.
PYINFER_DEVICE uint64_t top_p_share(float top_p, uint64_t mass) {
    if (!(top_p < 1.f)) {
        return UNLIMITED;
    }
    if (!(top_p > 0.f)) {
        return 1ull;
    }
    const uint32_t bits = __float_as_uint(top_p);
    const int exponent = static_cast<int>(bits >> 23);
    const uint64_t m = (bits & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0u);
    const int e = 150 - max_of(exponent, 1);  // 24 or more, since top_p < 1
    uint64_t low = m * (mass & 0xffffffffull);
    const uint64_t high = m * (mass >> 32) + (low >> 32);
    low &= 0xffffffffull;
    uint64_t share = 0, rest = 1;
    if (e < 32) {
        share = (high << (32 - e)) + (low >> e);
        rest = low & ((1ull << e) - 1);
    } else if (e < 94) {
        share = high >> (e - 32);
        rest = low | (high & ((1ull << (e - 32)) - 1));
    }
    return max_of(share + (rest != 0 ? 1ull : 0ull), uint64_t{1});
}

// exp(d) for d <= 0, within 1.5 ulp; 0 below -87 and for NaN. Spelt out in single IEEE operations, the same as exp_nonpositive in
// pyinfer/cpu/sampling.py, so that both backends compute the same softmax to the bit. NOTE: ex2.approx is no faster here: 16 results per clock and
// multiprocessor against 128 for each of these operations, and its last bits are the GPU's own.
PYINFER_DEVICE float exp_nonpositive(float d) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    const float shifted = __fmaf_rn(d, LOG2_E, ROUND);
    const float n = __fadd_rn(shifted, -ROUND);
    float r = __fmaf_rn(n, -0.693147182464599609375f, d);  // minus n * ln 2, in two parts
    r = __fmaf_rn(n, 1.904654290582768e-09f, r);
    float tail = __fmaf_rn(0.0013814467238262296f, r, 0.008368780836462975f);
    tail = __fmaf_rn(tail, r, 0.04166839271783829f);
    tail = __fmaf_rn(tail, r, 0.1666651964187622f);
    tail = __fmaf_rn(tail, r, 0.4999999403953552f);
    const float value = __fadd_rn(__fmaf_rn(__fmul_rn(r, r), tail, r), 1.f);
    const float scaled = __uint_as_float(__float_as_uint(value) + (__float_as_uint(shifted) << 23));
    return d >= -87.f ? scaled : 0.f;
}
