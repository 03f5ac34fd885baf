// Rotary position embedding on the fly: rows of a tile in shared memory are rotated in place, or on their way from an 8-bit tile to a
// 16-bit one. Non-interleaved halves over the full head dimension: (x[i], x[i + D/2]) turn by position * frequency[i].
//
// Frequencies are fractions of a turn per position, scaled by 2^64: position * frequency in 64-bit integers wraps exactly where the angle
// does, so positions of any size (and negative ones) cost no range reduction and no digits.
#pragma once
#include "common/fp8.cuh"
#include "common/ptx_math.cuh"
#include "common/swizzle.cuh"

// (cos, sin) of an angle in fractions of a turn, scaled by 2^64.
PYINFER_DEVICE float2 unit_vector(uint64_t phase) {
    constexpr float RADIANS = 6.283185307179586f / 4294967296.0f;
    const float angle = static_cast<float>(static_cast<int32_t>(phase >> 32)) * RADIANS;
    return make_float2(cos_approx(angle), sin_approx(angle));
}

// Two neighbouring elements of a row of a swizzled tile of T or an 8-bit type.
template <typename T, typename E, int ROW_BYTES>
PYINFER_DEVICE float2 load_pair(const char* tile, int row, int column) {
    constexpr int PER_CHUNK = 16 / sizeof(E);
    const char* at = tile + swizzled_offset<ROW_BYTES>(row, column / PER_CHUNK) + column % PER_CHUNK * static_cast<int>(sizeof(E));
    if constexpr (sizeof(E) == 1) {
        uint32_t lo, hi;
        unpack_fp8x4<f16, E>(*reinterpret_cast<const uint16_t*>(at), lo, hi);
        return unpack2<f16>(lo);
    } else {
        return unpack2<T>(*reinterpret_cast<const uint32_t*>(at));
    }
}

// One warp rotates ROWS rows of a tile of E at `from` into a tile of T at `to` (the same tile, if E is T). `position_of(row)`: int64.
// Neighbouring lanes take neighbouring pairs of elements. Columns behind HEAD_DIM, up to a multiple of 16, become zeros if E is not T.
template <typename T, typename E, int HEAD_DIM, int FROM_BYTES, int TO_BYTES, int ROWS, typename PositionOf>
PYINFER_DEVICE void rotate_rows(const char* from, char* to, const uint64_t* frequency, const PositionOf& position_of) {
    static_assert(HEAD_DIM % 8 == 0, "both halves are pairs of elements");
    constexpr int PER_ROW = HEAD_DIM / 4;
#pragma unroll 1
    for (int task = threadIdx.x % 32; task < ROWS * PER_ROW; task += 32) {
        const int row = task / PER_ROW;
        const int column = task % PER_ROW * 2;
        const uint64_t position = static_cast<uint64_t>(static_cast<int64_t>(position_of(row)));
        const float2 a = load_pair<T, E, FROM_BYTES>(from, row, column);
        const float2 b = load_pair<T, E, FROM_BYTES>(from, row, column + HEAD_DIM / 2);
        const float2 u = unit_vector(position * frequency[column]);
        const float2 v = unit_vector(position * frequency[column + 1]);
        const auto place = [&](int c) { return reinterpret_cast<uint32_t*>(to + swizzled_offset<TO_BYTES>(row, c / 8) + c % 8 * 2); };
        *place(column) = pack2<T>(a.x * u.x - b.x * u.y, a.y * v.x - b.y * v.y);
        *place(column + HEAD_DIM / 2) = pack2<T>(b.x * u.x + a.x * u.y, b.y * v.x + a.y * v.y);
    }
    if constexpr (HEAD_DIM % 16 != 0 && !is_same_v<T, E>) {
        for (int row = threadIdx.x % 32; row < ROWS; row += 32) {
            *reinterpret_cast<uint4*>(to + swizzled_offset<TO_BYTES>(row, HEAD_DIM / 8)) = uint4{0, 0, 0, 0};
        }
    }
}
