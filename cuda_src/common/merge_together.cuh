// The merge of a tile's KV splits by all the blocks that made them, inside the launch: each takes some of the rows.
//
// Why not by the last block alone (merge.cuh): with wide rows and many splits, 64 rows x 512 columns x 32 splits say, one block would read 4 MB, some 40 us;
// together they read what they wrote.
//
// Why it cannot hang: a block waits for the others for a limited time and then leaves. The last one to arrive does not wait, and goes on until all rows are taken.
// Which block merges a row decides nothing about its bits: splits are summed in their order.
#pragma once
#include "common/merge.cuh"

// The semaphore's word: arrivals, then rows taken, in the low bits; blocks that have left in the high ones. The last to leave puts it back to zero.
constexpr int32_t MERGE_LEFT = 1 << 20;
constexpr int32_t MERGE_COUNT = MERGE_LEFT - 1;

PYINFER_DEVICE int32_t load_acquire(const int32_t* p) {
    int32_t x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// THREADS threads call this, a multiple of 2 * 128, numbered by `thread`, after their partials and their partial LSEs are written; `sync` is their barrier. `row_0`
// is the tile's first partial row of split 0, `split_stride` the rows between splits. `mailbox`: one word of shared memory.
template <typename T, int HEAD_DIM, int THREADS, typename Params, typename Sync>
PYINFER_DEVICE void merge_together(const Params& p, const AttentionWork& w, int32_t* word, int64_t row_0, int64_t split_stride, int thread, int patience,
                                   volatile int* mailbox, const Sync& sync) {
    constexpr int COLUMNS = 4;
    constexpr int ROW_THREADS = HEAD_DIM / COLUMNS;
    constexpr int ROWS = THREADS / ROW_THREADS;  // at a time
    static_assert(ROW_THREADS % 32 == 0 && THREADS % ROW_THREADS == 0, "whole warps share a row");
    const int share = ceil_div(ceil_div(w.row_count, w.num_splits), ROWS) * ROWS;  // rows that a block takes at a time
    const int shares = ceil_div(w.row_count, share);

    __threadfence();
    sync();
    if (thread == 0) {
        int count = (atomicAdd(word, 1) & MERGE_COUNT) + 1;
        for (int64_t end = clock64() + patience; count < w.num_splits && clock64() < end;) {
            count = load_acquire(word) & MERGE_COUNT;
        }
        *mailbox = count < w.num_splits ? shares : (atomicAdd(word, 1) & MERGE_COUNT) - w.num_splits;
        __threadfence();
    }
    sync();
    for (int mine = *mailbox; mine < shares;) {
        sync();  // all have read it
        if (thread == 0) {  // the next one: the answer arrives while this one is merged
            *mailbox = (atomicAdd(word, 1) & MERGE_COUNT) - w.num_splits;
        }
        for (int row = mine * share + thread / ROW_THREADS; row < min_of((mine + 1) * share, w.row_count); row += ROWS) {
            const int lane = thread % 32;
            const float* lse = p.partial_lse + row_0 + row;
            float highest = -infinity();
            for (int s = lane; s < w.num_splits; s += 32) {
                highest = fmaxf(highest, __ldcg(lse + s * split_stride));
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
            }
            const float reference = highest == -infinity() ? 0.0f : highest;
            float total = 0.0f;
            for (int s = lane; s < w.num_splits; s += 32) {
                total += exp2_approx(__ldcg(lse + s * split_stride) - reference);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                total += __shfl_xor_sync(0xffffffffu, total, offset);
            }
            const float factor = normaliser(total);

            // A thread owns 4 columns; weights go from lane to lane.
            const int column = thread % ROW_THREADS * COLUMNS;
            const float* partial = p.partial_o + (row_0 + row) * HEAD_DIM + column;
            float sum[COLUMNS] = {};
            for (int first = 0; first < w.num_splits; first += 32) {
                const int count = min_of(32, w.num_splits - first);
                const float weight = lane < count ? exp2_approx(__ldcg(lse + (first + lane) * split_stride) - reference) * factor : 0.0f;
#pragma unroll 8
                for (int s = 0; s < count; ++s) {
                    const float share_of = __shfl_sync(0xffffffffu, weight, s);
                    const float4 o = __ldcg(reinterpret_cast<const float4*>(partial + (first + s) * split_stride * HEAD_DIM));
                    sum[0] = fmaf(share_of, o.x, sum[0]);
                    sum[1] = fmaf(share_of, o.y, sum[1]);
                    sum[2] = fmaf(share_of, o.z, sum[2]);
                    sum[3] = fmaf(share_of, o.w, sum[3]);
                }
            }
            const OutputRow at = output_row(p, w, row);
            vec_t<T, COLUMNS> result;
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                result[i] = from_float<T>(sum[i]);
            }
            result.store(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column);
            if (column == 0) {
                store_lse(p, at, log_sum(reference, total));
            }
        }
        sync();
        mine = *mailbox;
    }
    if (thread == 0 && (static_cast<uint32_t>(atomicAdd(word, MERGE_LEFT)) >> 20) == static_cast<uint32_t>(w.num_splits - 1)) {
        *word = 0;  // nobody comes any more
    }
}
