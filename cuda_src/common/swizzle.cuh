// The shared-memory layout of every 16-bit tile that ldmatrix reads.
#pragma once
#include "common/types.cuh"

// A tile is [rows][ROW_BYTES]; a row is cut into chunks of 16 bytes, and chunk c of row r is stored at place c ^ (r % 8).
// ldmatrix reads 8 rows at one chunk position, cp.async writes 8 neighbouring chunks of a row: both then touch all 32 banks once.
// Why not padded rows: they cost shared memory that limits the blocks per SM, and break the alignment TMA and wgmma want later.
template <int ROW_BYTES>
PYINFER_DEVICE uint32_t swizzled_offset(int row, int chunk) {
    static_assert(ROW_BYTES % 128 == 0, "a row holds a multiple of 8 chunks");
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}
