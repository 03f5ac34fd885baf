// Rotating pairs of elements: what the rope kernels share.
#pragma once
#include "common/types.cuh"
#include "common/vec_io.cuh"

// Cosines and sines of VEC pairs from `pair` on, from a table row of PAIRS cosines and as many sines. A position outside the table gives NaN: visibly wrong
// instead of somebody else's memory.
template <int PAIRS, int VEC>
PYINFER_DEVICE void load_cos_sin(const float* table, int64_t stride, int64_t max_position, int64_t position, int pair, float (&cosine)[VEC],
                                 float (&sine)[VEC]) {
    if (static_cast<uint64_t>(position) < static_cast<uint64_t>(max_position)) {
        const float* row = table + position * stride + pair;
        load_floats<float, VEC>(row, cosine);
        load_floats<float, VEC>(row + PAIRS, sine);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            cosine[i] = sine[i] = __int_as_float(0x7fffffff);
        }
    }
}

// An angle in fractions of a turn, scaled by 2^64, to radians in [-pi, pi).
PYINFER_DEVICE float to_radians(uint64_t phase) {
    constexpr float RADIANS = 6.283185307179586f / 4294967296.0f;
    return static_cast<float>(static_cast<int32_t>(phase >> 32)) * RADIANS;
}

// Two vectors of VEC pairs rotated: pair i is elements (i, VEC + i) of the 2 * VEC, or (2i, 2i + 1) if INTERLEAVE.
template <bool INTERLEAVE, int VEC>
PYINFER_DEVICE void rotate(const float (&f)[2][VEC], const float (&cosine)[VEC], const float (&sine)[VEC], float (&r)[2][VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const int a = INTERLEAVE ? 2 * i : i, b = INTERLEAVE ? 2 * i + 1 : VEC + i;
        const float fa = f[a / VEC][a % VEC], fb = f[b / VEC][b % VEC];
        r[a / VEC][a % VEC] = fa * cosine[i] - fb * sine[i];
        r[b / VEC][b % VEC] = fb * cosine[i] + fa * sine[i];
    }
}

template <bool INTERLEAVE, typename V, int VEC>
PYINFER_DEVICE void rotate(const V& first, const V& second, const float (&cosine)[VEC], const float (&sine)[VEC], float (&r)[2][VEC]) {
    float f[2][VEC];
    first.to_floats(f[0]);
    second.to_floats(f[1]);
    rotate<INTERLEAVE>(f, cosine, sine, r);
}
