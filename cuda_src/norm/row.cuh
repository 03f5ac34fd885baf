// What the row normalisations share.
#pragma once
#include "common/ptx_sync.cuh"
#include "common/types.cuh"

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
