// Ways for results to leave registers: one function per instruction.
#pragma once
#include "common/types.cuh"

// Four 8 x 8 matrices of 16-bit elements to shared memory (sm_90). x[m] is this lane's pair of matrix m, as mma's accumulators lie: row lane / 4, columns
// 2 * (lane % 4) and + 1. Lane 8m + r gives the address of row r of matrix m, 16 bytes.
PYINFER_DEVICE void store_matrices_4(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// A box of shared memory to a 4-D tensor (sm_90), what lies outside of it dropped. Stores are grouped by `tma_commit`; after `tma_wait_read` the
// shared memory of all groups may be used again. What ordinary stores wrote there needs `fence_async_proxy` in front.
PYINFER_DEVICE void tma_store_4d(const TensorMap* map, uint32_t source, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(source), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}
PYINFER_DEVICE void tma_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
PYINFER_DEVICE void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until all of the thread's stores are done.
PYINFER_DEVICE void tma_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// 16 bytes to global memory if `wanted`, by a predicate: a branch around each of a row of stores would keep their loads from overlapping.
PYINFER_DEVICE void store_global_16_if(bool wanted, void* p, const uint4& x) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(static_cast<int>(wanted)), "l"(p), "r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
