// Where a token's key and value rows are (ragged or paged, NHD or HND: only strides differ), and the copies that fetch rows.
#pragma once
#include "common/ptx_cp_async.cuh"
#include "common/swizzle.cuh"

// n / d for 0 <= n < 2^31 with the host's magic = ceil(2^(31 + l) / d), shift = 31 + l, l = ceil(log2 d).
PYINFER_DEVICE int fast_divide(int n, uint32_t magic, int shift) {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> shift);
}

// A token's place: row `slot` of page `page`; a ragged tensor is one page.
struct TokenPlace {
    int page;
    int slot;
};

// `kv_base`: the request's first entry in kv_indices (paged). Reads one page id; nothing waits for it here.
template <typename Params>
PYINFER_DEVICE TokenPlace locate_token(const Params& p, int kv_base, int token) {
    if (p.kv_indices == nullptr) {
        return {0, token};
    }
    const int page_index = fast_divide(token, p.page_magic, p.page_shift);
    return {p.kv_indices[kv_base + page_index], token - page_index * p.page_size};
}

// The lane index, read anew: what is derived from it is recomputed where it stands instead of being kept in registers across a loop.
// NOTE: that is worth 9 registers in prefill at head_dim 128, which has 255 and would spill.
PYINFER_DEVICE int fresh_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// One warp copies ROWS rows of ROW_BYTES bytes into a swizzled tile, 512 bytes an instruction. Lane r (< ROWS) knows where row r
// is (`lane_row_offset`, bytes from `base`); rows from `valid_rows` on become zeros, so that what lies behind them, NaN perhaps,
// never enters a product.
template <int ROW_BYTES, int ROWS>
PYINFER_DEVICE void copy_rows(uint32_t tile, const char* base, int64_t lane_row_offset, int valid_rows) {
    constexpr int CHUNKS = ROW_BYTES / 16;
    constexpr int STEPS = ROWS * CHUNKS / 32;
    static_assert(ROWS <= 32, "a lane holds one row's offset");
    static_assert(ROWS * CHUNKS % 32 == 0, "whole instructions only");
    const int lane = fresh_lane();
    if constexpr (32 % CHUNKS == 0) {
        // A step is 32 / CHUNKS whole rows, at most 8 and a power of two, so its share of row % 8 is a constant: it xors into one lane address.
        constexpr int STEP_ROWS = 32 / CHUNKS;
        const int lane_row = lane / CHUNKS;
        const uint32_t lane_tile = tile + swizzled_offset<ROW_BYTES>(lane_row, lane % CHUNKS);
        const char* lane_base = base + lane % CHUNKS * 16;
        const int lane_valid = valid_rows - lane_row;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int64_t offset = __shfl_sync(0xffffffffu, lane_row_offset, i * STEP_ROWS + lane_row);
            const uint32_t place = (lane_tile ^ (i * STEP_ROWS % 8 * 16)) + i * STEP_ROWS * ROW_BYTES;
            cp_async_16(place, lane_base + offset, i * STEP_ROWS < lane_valid);
        }
    } else {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int row = (i * 32 + lane) / CHUNKS;
            const int chunk = (i * 32 + lane) % CHUNKS;
            const int64_t offset = __shfl_sync(0xffffffffu, lane_row_offset, row);
            cp_async_16(tile + swizzled_offset<ROW_BYTES>(row, chunk), base + offset + chunk * 16, row < valid_rows);
        }
    }
}
