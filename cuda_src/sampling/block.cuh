// Reductions over a block of up to 32 warps, so that one warp scans one value of every warp. A template that wants fewer than 1024 threads defines
// SAMPLING_BLOCK before it includes this.
#pragma once

#include "common/ptx_sync.cuh"
#include "common/types.cuh"

#ifndef SAMPLING_BLOCK
#define SAMPLING_BLOCK 1024
#endif
constexpr int BLOCK = SAMPLING_BLOCK;
constexpr int WARPS = BLOCK / 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

PYINFER_DEVICE int lane_id() {
    return threadIdx.x & 31;
}
PYINFER_DEVICE int warp_id() {
    return threadIdx.x >> 5;
}

template <typename T>
PYINFER_DEVICE T warp_inclusive_scan(T x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        const T below = __shfl_up_sync(ALL_LANES, x, distance);
        x += lane_id() >= distance ? below : T{0};
    }
    return x;
}

PYINFER_DEVICE uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    }
    return x;
}

// One slot a warp, then the total. Every function below leaves the scratch free for the next call.
struct BlockScratch {
    uint64_t slot[WARPS + 1];
};

// Sum over the threads before this one; `total` over all of them.
PYINFER_DEVICE uint64_t block_exclusive_scan(uint64_t x, BlockScratch& scratch, uint64_t& total) {
    const uint64_t inclusive = warp_inclusive_scan(x);
    if (lane_id() == 31) {
        scratch.slot[warp_id()] = inclusive;
    }
    __syncthreads();
    if (warp_id() == 0) {
        const uint64_t own = lane_id() < WARPS ? scratch.slot[lane_id()] : 0;
        const uint64_t sum = warp_inclusive_scan(own);
        if (lane_id() < WARPS) {
            scratch.slot[lane_id()] = sum - own;
        }
        if (lane_id() == 31) {
            scratch.slot[WARPS] = sum;
        }
    }
    __syncthreads();
    total = scratch.slot[WARPS];
    const uint64_t before = scratch.slot[warp_id()] + (inclusive - x);
    __syncthreads();
    return before;
}

PYINFER_DEVICE uint64_t block_sum(uint64_t x, BlockScratch& scratch) {
    const uint64_t of_warp = warp_sum(x);
    if (lane_id() == 0) {
        scratch.slot[warp_id()] = of_warp;
    }
    __syncthreads();
    const uint64_t total = warp_sum(lane_id() < WARPS ? scratch.slot[lane_id()] : 0);
    __syncthreads();
    return total;
}

PYINFER_DEVICE uint32_t block_max(uint32_t x, BlockScratch& scratch) {
    const uint32_t of_warp = __reduce_max_sync(ALL_LANES, x);
    if (lane_id() == 0) {
        scratch.slot[warp_id()] = of_warp;
    }
    __syncthreads();
    const uint32_t largest = __reduce_max_sync(ALL_LANES, lane_id() < WARPS ? static_cast<uint32_t>(scratch.slot[lane_id()]) : 0u);
    __syncthreads();
    return largest;
}
