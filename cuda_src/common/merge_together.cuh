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

// out = sum of the splits' rows [begin, begin + rows), by their weights [row][split]. A thread has 4 columns of ROWS_OF_ITS_OWN rows and SPLITS splits under way.
template <typename T, int HEAD_DIM, int ROWS, int ROWS_OF_ITS_OWN, int SPLITS, typename Params>
PYINFER_DEVICE void add_splits(const Params& p, const AttentionWork& w, int64_t row_0, int64_t split_stride, int begin, int rows, int thread,
                               const float* weights) {
    constexpr int COLUMNS = 4;
    constexpr int ROW_THREADS = HEAD_DIM / COLUMNS;
    const int column = thread % ROW_THREADS * COLUMNS;
    for (int first = thread / ROW_THREADS; first < rows; first += ROWS * ROWS_OF_ITS_OWN) {
        float sum[ROWS_OF_ITS_OWN][COLUMNS] = {};
        const float* partial = p.partial_o + (row_0 + begin + first) * HEAD_DIM + column;
        for (int s = 0; s < w.num_splits; s += SPLITS) {
            float4 o[SPLITS][ROWS_OF_ITS_OWN];
#pragma unroll
            for (int k = 0; k < SPLITS; ++k) {
#pragma unroll
                for (int d = 0; d < ROWS_OF_ITS_OWN; ++d) {
                    if (s + k < w.num_splits && first + d * ROWS < rows) {
                        o[k][d] = __ldcg(reinterpret_cast<const float4*>(partial + ((s + k) * split_stride + d * ROWS) * HEAD_DIM));
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < SPLITS; ++k) {
#pragma unroll
                for (int d = 0; d < ROWS_OF_ITS_OWN; ++d) {
                    if (s + k < w.num_splits && first + d * ROWS < rows) {
                        const float weight = weights[(first + d * ROWS) * w.num_splits + s + k];
                        sum[d][0] = fmaf(weight, o[k][d].x, sum[d][0]);
                        sum[d][1] = fmaf(weight, o[k][d].y, sum[d][1]);
                        sum[d][2] = fmaf(weight, o[k][d].z, sum[d][2]);
                        sum[d][3] = fmaf(weight, o[k][d].w, sum[d][3]);
                    }
                }
            }
        }
#pragma unroll
        for (int d = 0; d < ROWS_OF_ITS_OWN; ++d) {
            if (first + d * ROWS < rows) {
                const OutputRow at = output_row(p, w, begin + first + d * ROWS);
                vec_t<T, COLUMNS> result;
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    result[i] = from_float<T>(sum[d][i]);
                }
                result.store(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column);
            }
        }
    }
}

// THREADS threads call this, whole multiples of HEAD_DIM / 4, numbered by `thread`, after their partials and their partial LSEs are written; `sync` is their
// barrier. `row_0` is the tile's first partial row of split 0, `split_stride` the rows between splits. `mailbox`: one word of shared memory; `weights`: room
// for ROOM floats there.
template <typename T, int HEAD_DIM, int THREADS, int ROOM, typename Params, typename Sync>
PYINFER_DEVICE void merge_together(const Params& p, const AttentionWork& w, int32_t* word, int64_t row_0, int64_t split_stride, int thread, int patience,
                                   volatile int* mailbox, float* weights, const Sync& sync) {
    constexpr int ROW_THREADS = HEAD_DIM / 4;
    constexpr int ROWS = THREADS / ROW_THREADS;  // that the threads have side by side
    static_assert(ROW_THREADS % 32 == 0 && THREADS % ROW_THREADS == 0, "whole warps share a row");
    // Rows that a block takes at a time: its share, if the weights of so many find room.
    const int share = max_of(1, min_of(ceil_div(w.row_count, w.num_splits), ROOM / w.num_splits));
    const int shares = ceil_div(w.row_count, share);
    const int lane = thread % 32;

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
        const int begin = mine * share;
        const int rows = min_of(share, w.row_count - begin);
        sync();  // all have read it
        if (thread == 0) {  // the next one: the answer arrives while this one is merged
            *mailbox = (atomicAdd(word, 1) & MERGE_COUNT) - w.num_splits;
        }
        // What each split counts in each row: [row][split]. A warp makes a row's.
        for (int row = thread / 32; row < rows; row += THREADS / 32) {
            const float* lse = p.partial_lse + row_0 + begin + row;
            float highest = -infinity();
            for (int s = lane; s < w.num_splits; s += 32) {
                const float x = __ldcg(lse + s * split_stride);
                weights[row * w.num_splits + s] = x;
                highest = fmaxf(highest, x);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
            }
            const float reference = highest == -infinity() ? 0.0f : highest;
            float total = 0.0f;
            for (int s = lane; s < w.num_splits; s += 32) {
                total += exp2_approx(weights[row * w.num_splits + s] - reference);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                total += __shfl_xor_sync(0xffffffffu, total, offset);
            }
            const float factor = normaliser(total);
            for (int s = lane; s < w.num_splits; s += 32) {
                float& weight = weights[row * w.num_splits + s];
                weight = exp2_approx(weight - reference) * factor;
            }
            if (lane == 0) {
                store_lse(p, output_row(p, w, begin + row), log_sum(reference, total));
            }
        }
        sync();

        // Few rows of many splits, or many rows of few: 12 loads of a thread are under way either way (16 would spill).
        if (share <= ROWS) {
            add_splits<T, HEAD_DIM, ROWS, 1, 12>(p, w, row_0, split_stride, begin, rows, thread, weights);
        } else {
            add_splits<T, HEAD_DIM, ROWS, 4, 3>(p, w, row_0, split_stride, begin, rows, thread, weights);
        }
        sync();
        mine = *mailbox;
    }
    if (thread == 0 && (static_cast<uint32_t>(atomicAdd(word, MERGE_LEFT)) >> 20) == static_cast<uint32_t>(w.num_splits - 1)) {
        *word = 0;  // nobody comes any more
    }
}
