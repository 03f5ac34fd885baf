// What the row normalisations share. A row belongs to LANES threads: thread `lane` has vectors lane, lane + LANES, ..., up to SLOTS of them kept.
#pragma once
#include "common/ptx_cp_async.cuh"
#include "common/ptx_sync.cuh"
#include "common/vec_io.cuh"

// Where a row of [rows, hidden] begins whose leading axes are two, `inner` rows to each step of the outer one.
PYINFER_DEVICE int64_t row_offset(uint32_t row, uint32_t inner, int64_t outer_stride, int64_t inner_stride) {
    return row / inner * outer_stride + row % inner * inner_stride;
}

// What all rows are multiplied by, fetched into L2 by one block. Before pdl_wait: a fetch reads nothing, so it may run while another kernel still writes.
PYINFER_DEVICE void prefetch_shared(const void* p, int bytes) {
    if (blockIdx.x == 0 && threadIdx.y == 0) {
        for (int i = threadIdx.x * 128; i < bytes; i += blockDim.x * 128) {
            prefetch_l2(static_cast<const uint8_t*>(p) + i);
        }
    }
}

// A block's next STAGES - 1 rows on their way to shared memory while it works on one. Every thread copies, and reads, only what is its own: no barrier.
template <typename V, int LANES, int SLOTS, int THREADS, int STAGES>
struct RowRing {
    V* mine;  // this thread's column of [STAGES][SLOTS][THREADS] vectors

    PYINFER_DEVICE explicit RowRing(void* shared) : mine(static_cast<V*>(shared) + threadIdx.y * LANES + threadIdx.x) {}

    // One group of copies, empty where n <= 0. `stage` counts up for ever.
    template <typename T>
    PYINFER_DEVICE void request(uint32_t stage, const T* x, int n) const {
        V* to = mine + stage % STAGES * (SLOTS * THREADS);
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            if (s * LANES < n) {
                cp_async_16(smem_address(to + s * THREADS), x + s * LANES * (16 / sizeof(T)), true);
            }
        }
        cp_async_commit();
    }

    // The row of `stage`, which must be the oldest under way.
    PYINFER_DEVICE void take(uint32_t stage, int n, V (&kept)[SLOTS]) const {
        cp_async_wait<STAGES - 1>();
        const V* from = mine + stage % STAGES * (SLOTS * THREADS);
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            kept[s] = s * LANES < n ? from[s * THREADS] : V::zero();
        }
    }
};
