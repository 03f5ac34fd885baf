// Sums and maxima over the threads of a warp or a block. Every thread gets the result, and the order of additions is fixed.
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

// The larger of two; NaN if either is.
PYINFER_DEVICE float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// The largest over groups of LANES neighbouring lanes, NaN if there is one. All 32 lanes of the warp must call it.
template <int LANES = 32>
PYINFER_DEVICE float warp_max(float x) {
    static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group of lanes is a power of two up to 32");
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        x = max_nan(x, __shfl_xor_sync(FULL_WARP, x, offset));
    }
    return x;
}

// The largest magnitude over the LANES threads that share a row, as `row_sum` adds up (x >= 0 or NaN).
template <int LANES>
PYINFER_DEVICE float row_max(float x, float* partials) {
    if constexpr (LANES <= 32) {
        return warp_max<LANES>(x);
    } else {
        constexpr int WARPS = LANES / 32;
        x = warp_max(x);
        if constexpr (WARPS == 1) {
            return x;
        }
        const int lane = threadIdx.x % 32;
        if (lane == 0) {
            partials[threadIdx.x / 32] = x;
        }
        __syncthreads();
        return warp_max(lane < WARPS ? partials[lane] : 0.0f);
    }
}

// Sum and largest magnitude of a row behind one barrier. Uses 2 * ceil(LANES / 32) floats of shared memory.
template <int LANES>
PYINFER_DEVICE void row_sum_and_max(float& sum, float& largest, float* partials) {
    constexpr int WARPS = LANES / 32;
    sum = warp_sum<LANES <= 32 ? LANES : 32>(sum);
    largest = warp_max<LANES <= 32 ? LANES : 32>(largest);
    if constexpr (WARPS > 1) {
        const int lane = threadIdx.x % 32;
        if (lane == 0) {
            partials[threadIdx.x / 32] = sum;
            partials[WARPS + threadIdx.x / 32] = largest;
        }
        __syncthreads();
        sum = warp_sum(lane < WARPS ? partials[lane] : 0.0f);
        largest = warp_max(lane < WARPS ? partials[WARPS + lane] : 0.0f);
    }
}
