// Around wgmma (sm_90a). The products themselves have a width in their name and are written out by the templates (`wgmma_ss`, `wgmma_rs`).
#pragma once
#include "common/types.cuh"

// The matrix descriptor: a tile of 16-bit elements in shared memory with 128-byte rows and the 128-byte swizzle (16-byte chunk c of row r at c ^ (r % 8)),
// aligned to 1024 bytes; what TMA writes with SWIZZLE_128B.
//   contiguous along the contraction (queries, keys):   `stride` = bytes between groups of 8 rows (1024); `leading` unused. 16 columns further: + 32 bytes.
//   contiguous along the other axis (values):           `stride` = bytes between groups of 8 keys (1024), `leading` = bytes between blocks of 64 columns.
//                                                       16 keys further: + 2048 bytes.
// Bits: address / 16 at 0, leading / 16 at 16, stride / 16 at 32, swizzle mode 1 at 62.
PYINFER_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

// Before the first product, and after registers that a product reads or adds to have been written.
PYINFER_DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
PYINFER_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most N of the latest groups are under way.
template <int N>
PYINFER_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// NOTE: the products write their registers after the asm statement that issues them. Passed through here behind the wait, the compiler cannot read
// a register before it.
template <int N>
PYINFER_DEVICE void wgmma_pin(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            asm volatile("" : "+f"(x[i][j])::"memory");
        }
    }
}
