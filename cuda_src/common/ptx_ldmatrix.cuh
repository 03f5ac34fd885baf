// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into one warp's registers.
#pragma once
#include "common/types.cuh"

// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned). Afterwards lane l holds, of each
// matrix i, the two elements r[i] = M_i[l / 4][2 * (l % 4) .. + 1].
// NOTE: volatile and the memory clobber keep it behind the barrier that makes the shared memory valid.
PYINFER_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same with every matrix transposed: r[i] = { M_i[2 * (l % 4)][l / 4], M_i[2 * (l % 4) + 1][l / 4] }.
PYINFER_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
