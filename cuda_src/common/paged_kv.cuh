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
// The same of the thread's index in its block.
PYINFER_DEVICE int fresh_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
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

// The same for any head dimension and alignment. Of a row in memory COLUMNS elements are read; behind them zeros follow up to whole mma
// steps of 16 columns. Without ALIGNED, addresses are multiples of the element's size only, and elements pass through registers, which is
// slower; the caller's waits and barriers are the same.
template <typename T, int COLUMNS, int ROW_BYTES, int ROWS, bool ALIGNED>
PYINFER_DEVICE void copy_matrix(uint32_t tile, const char* base, int64_t lane_row_offset, int valid_rows) {
    constexpr int BYTES = COLUMNS * sizeof(T);
    if constexpr (ALIGNED && BYTES == ROW_BYTES) {
        copy_rows<ROW_BYTES, ROWS>(tile, base, lane_row_offset, valid_rows);
    } else {
        constexpr int CHUNKS = ceil_div(COLUMNS, 16) * sizeof(T);
        static_assert(CHUNKS * 16 <= ROW_BYTES && ROWS <= 32, "padding lies inside the row; a lane holds one row's offset");
        const int lane = fresh_lane();
#pragma unroll 4
        for (int i = 0; i < ceil_div(ROWS * CHUNKS, 32); ++i) {
            const int row = (i * 32 + lane) / CHUNKS;
            const int chunk = (i * 32 + lane) % CHUNKS;
            const int64_t offset = __shfl_sync(0xffffffffu, lane_row_offset, min_of(row, ROWS - 1));
            const int bytes = row < valid_rows ? max_of(0, min_of(16, BYTES - chunk * 16)) : 0;
            const char* source = base + offset + (bytes > 0 ? chunk * 16 : 0);
            const uint32_t place = tile + swizzled_offset<ROW_BYTES>(row, chunk);
            if (row < ROWS) {
                if constexpr (ALIGNED) {
                    cp_async_16_partial(place, source, bytes);
                } else {
                    using bits_t = conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
                    constexpr int PER_WORD = 4 / sizeof(T);
                    uint32_t word[4] = {};
#pragma unroll
                    for (int j = 0; j < 16 / static_cast<int>(sizeof(T)); ++j) {
                        if (j * static_cast<int>(sizeof(T)) < bytes) {
                            const uint32_t element = reinterpret_cast<const bits_t*>(source)[j];
                            word[j / PER_WORD] |= element << (j % PER_WORD * 8 * sizeof(T));
                        }
                    }
                    store_shared_16(place, word);
                }
            }
        }
    }
}
