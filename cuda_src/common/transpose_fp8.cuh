// Transposes a tile of values of 8 bits in shared memory: wgmma takes 8-bit operands only contiguous along the contraction, which here are the keys.
//
// From [keys][columns], blocks of 128 columns, rows of 128 bytes with the 128-byte swizzle (what TMA writes), to [columns][keys], blocks of 128 keys, the
// same kind of rows. Within 16 keys the order becomes 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, that of softmax_fp8.cuh's weights.
//
// ldmatrix.trans moves pairs of bytes: of two matrices, keys 0-7 and 8-15 of the same 16 columns, lane l gets keys 2t, 2t + 1 and 2t + 8, 2t + 9 (t = l % 4)
// of columns 2g and 2g + 1 (g = l / 4). A byte permutation separates the columns; each result is four neighbours of a row of the new tile.
// Two rows that a lane holds go to two matrices of stmatrix. Lanes from 16 on swap them, so that the eight rows of one matrix differ modulo 8: no bank
// is written twice.
#pragma once
#include "common/paged_kv.cuh"
#include "common/ptx_ldmatrix.cuh"
#include "common/ptx_store.cuh"
#include "common/swizzle.cuh"

// One warp's share: columns [first_column, first_column + COLUMNS) of KEYS keys. FROM_BLOCK, TO_BLOCK: bytes from one block of 128 columns to the next in
// `from`, of 128 keys in `to`. Keys from `valid` on, which may be anything there, NaN too, become zeros.
template <int KEYS, int COLUMNS, int FROM_BLOCK, int TO_BLOCK>
PYINFER_DEVICE void transpose_values(uint32_t from, uint32_t to, int first_column, int valid) {
    static_assert(KEYS % 16 == 0 && COLUMNS % 32 == 0, "matrices of 16 keys, two of 16 columns at a time");
    const int lane = fresh_lane();  // what follows from it is not worth keeping in a producer's few registers
    const int matrix = lane / 8;
    const int row = lane % 8;
    // Matrices of a load: keys (matrix % 2) * 8 on, columns (matrix / 2) * 16 on; of a store: the first or the second row of each lane, columns as loaded.
    const uint32_t load_row = (matrix % 2 * 8 + row) * 128;
    const int column = matrix / 2 * 16 + 2 * row + (row / 4 ^ matrix % 2);
    const uint32_t store_row = column * 128 + column % 8 * 16;
    const uint32_t selector = lane < 16 ? 0x6420u : 0x7531u;
    const auto turn = [&](uint32_t source, uint32_t target, int block, int valid_keys) {
        uint32_t x[4];
        ldmatrix_x4_trans(x, source + block * 2048);
        if (valid_keys < 16) {
            const auto keep = [&](int key) { return key + 1 < valid_keys ? 0xffffffffu : key < valid_keys ? 0x0000ffffu : 0u; };
            const uint32_t low = keep(lane % 4 * 2), high = keep(lane % 4 * 2 + 8);
            x[0] &= low, x[2] &= low;
            x[1] &= high, x[3] &= high;
        }
        const uint32_t y[4] = {__byte_perm(x[0], x[1], selector), __byte_perm(x[0], x[1], selector ^ 0x1111u), __byte_perm(x[2], x[3], selector),
                               __byte_perm(x[2], x[3], selector ^ 0x1111u)};
        store_matrices_4((target ^ block % 8 * 16) + block / 8 * TO_BLOCK, y);
    };
#pragma unroll 1
    for (int c = first_column; c < first_column + COLUMNS; c += 32) {
        const uint32_t source = from + c / 128 * FROM_BLOCK + load_row + ((c / 16 % 8 + matrix / 2) ^ row) * 16;
        const uint32_t target = to + c * 128 + store_row;
        if (valid >= KEYS) {
#pragma unroll
            for (int block = 0; block < KEYS / 16; ++block) {
                turn(source, target, block, 16);
            }
        } else {
#pragma unroll 1
            for (int block = 0; block < KEYS / 16; ++block) {
                turn(source, target, block, valid - block * 16);
            }
        }
    }
}
