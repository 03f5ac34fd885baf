// Sums over the threads of a warp or a block. Every thread gets the result, and the order of additions is fixed.
#pragma once
#include "common/types.cuh"

constexpr unsigned FULL_WARP = 0xffffffffu;

// Over groups of LANES neighbouring lanes (a power of two up to 32). All 32 lanes of the warp must call it.
template <int LANES = 32>
PYINFER_DEVICE float warp_sum(float x) {
    static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group of lanes is a power of two up to 32");
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, offset);
    }
    return x;
}

// Over a block of WARPS full warps along x; all threads must call it. One barrier: every warp adds up the warps' sums itself instead of waiting for a
// second barrier while one warp does. `partials` (WARPS floats of shared memory) may be used again only after another barrier.
template <int WARPS>
PYINFER_DEVICE float block_sum(float x, float* partials) {
    static_assert(WARPS >= 1 && WARPS <= 32, "a block has at most 32 warps");
    x = warp_sum(x);
    if (WARPS == 1) {
        return x;
    }
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        partials[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(lane < WARPS ? partials[lane] : 0.0f);
}

// Over the LANES threads that share a row: part of a warp, or a block of one row. Uses `partials` (ceil(LANES / 32) floats of shared memory) in the second case.
template <int LANES>
PYINFER_DEVICE float row_sum(float x, float* partials) {
    if constexpr (LANES <= 32) {
        return warp_sum<LANES>(x);
    } else {
        return block_sum<LANES / 32>(x, partials);
    }
}
