// Where results go, and the merge of a tile's KV splits inside the launch that made them, by the last block to arrive.
#pragma once
#include "common/attention_variant.cuh"
#include "common/ptx_sync.cuh"
#include "common/softmax.cuh"

// A packed row's place in q, out and lse.
struct OutputRow {
    int64_t token;
    int head;
};

template <typename Params>
PYINFER_DEVICE OutputRow output_row(const Params& p, const AttentionWork& w, int row) {
    const int packed = w.row_begin + row;
    const int token = fast_divide(packed, p.group_magic, p.group_shift);
    return {static_cast<int64_t>(w.qo_begin) + token, w.kv_head * p.group + packed - token * p.group};
}

template <typename Params>
PYINFER_DEVICE void store_lse(const Params& p, const OutputRow& at, float lse) {
    if (p.lse != nullptr) {
        p.lse[at.token * (static_cast<int64_t>(p.num_kv_heads) * p.group) + at.head] = lse;
    }
}

// How a row ends: what its accumulated output is multiplied by, and its LSE in base 2; 0 and -inf for a row without a visible key. A sink
// joins the denominator here, so exactly once: where the whole row is known, not in a split. `head_of()` gives the query head.
struct RowEnd {
    float factor;
    float lse;
};
// Whether a variant normalises: all do but an AttentionVariant with NO_SOFTMAX, whose rows are plain sums, without an LSE.
template <typename Variant>
struct Normalises {
    static constexpr bool value = true;
};
template <typename Params, uint32_t FEATURES>
struct Normalises<AttentionVariant<Params, FEATURES>> {
    static constexpr bool value = AttentionVariant<Params, FEATURES>::SOFTMAX;
};
template <typename Variant, typename HeadOf>
PYINFER_DEVICE RowEnd end_row(const Variant& variant, float reference, float sum, const HeadOf& head_of) {
    if constexpr (!Normalises<Variant>::value) {
        return {1.0f, 0.0f};
    } else if constexpr (Variant::SINKS) {
        if (sum == 0.0f) {
            return {0.0f, -infinity()};
        }
        const float sink = variant.sink(head_of());
        const float top = fmaxf(reference, sink);
        const float weight = exp2_approx(reference - top);
        const float total = fmaf(sum, weight, exp2_approx(sink - top));
        return {weight / total, top + log2_approx(total)};
    } else {
        return {normaliser(sum), log_sum(reference, sum)};
    }
}

// Neighbouring elements of an output row.
template <bool ALIGNED, typename T, int N>
PYINFER_DEVICE void store_columns(T* p, const vec_t<T, N>& x) {
    if constexpr (ALIGNED) {
        x.store(p);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            p[i] = x[i];
        }
    }
}

// Partial results of one split of one kv head: [TILE_Q, head_dim_vo] and [TILE_Q], at slot + split.
template <int TILE_Q, typename Params>
PYINFER_DEVICE int64_t partial_row(const Params& p, const AttentionWork& w, int split) {
    return ((static_cast<int64_t>(w.slot) + split) * p.num_kv_heads + w.kv_head) * TILE_Q;
}

// The barrier of the threads that merge: the whole block, or what a warp-specialised kernel passes for its share of it.
struct BlockSync {
    PYINFER_DEVICE void operator()() const { __syncthreads(); }
};

// Called by all merging threads after they have written their partials; true, for all of them, in the block that came last. That block sees
// the partials of all others and has put the semaphore back to zero. Without semaphores nobody merges: the next kernel will.
template <typename Params, typename Sync = BlockSync>
PYINFER_DEVICE bool arrive_last(const Params& p, const AttentionWork& w, const Sync& sync = {}) {
    __shared__ bool last;
    if (p.semaphore == nullptr) {
        return false;
    }
    sync();
    if (threadIdx.x == 0) {  // one ordered atomic for all: barriers pass the order on to the other threads, at no thread's cost of a fence
        int32_t* semaphore = p.semaphore + static_cast<int64_t>(w.semaphore) * p.num_kv_heads + w.kv_head;
        last = atomic_add_acq_rel(semaphore, 1) == w.num_splits - 1;
        if (last) {
            *semaphore = 0;
        }
    }
    sync();
    return last;
}

// The LSE of every row of the tile, log2 sum_s 2^lse_s, into `total` (TILE_Q floats of shared memory) and to where the caller asked for it.
template <int TILE_Q, int THREADS, typename Params, typename Variant>
PYINFER_DEVICE void merge_lse(const Params& p, const AttentionWork& w, const Variant& variant, float* total, int thread) {
    constexpr int GROUP = max_of(1, min_of(32, THREADS / TILE_Q));  // neighbouring lanes that share a row's splits
    static_assert(THREADS % TILE_Q == 0 || TILE_Q % THREADS == 0, "rows divide among the threads");
    const int64_t row_0 = partial_row<TILE_Q>(p, w, 0);
    const int64_t split_stride = static_cast<int64_t>(p.num_kv_heads) * TILE_Q;
    for (int task = thread; task < TILE_Q * GROUP; task += THREADS) {
        const int row = task / GROUP;
        const bool in_tile = row < w.row_count;
        const float* lse = p.partial_lse + row_0 + (in_tile ? row : 0);
        constexpr int KEPT = 4;  // a lane's first values are read once, more (that many splits are rare) twice
        float kept[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int s = task % GROUP + i * GROUP;
            kept[i] = s < w.num_splits ? __ldcg(lse + s * split_stride) : -infinity();
        }
        float highest = fmaxf(fmaxf(kept[0], kept[1]), fmaxf(kept[2], kept[3]));
#pragma unroll 4
        for (int s = task % GROUP + KEPT * GROUP; s < w.num_splits; s += GROUP) {
            highest = fmaxf(highest, __ldcg(lse + s * split_stride));
        }
#pragma unroll
        for (int offset = GROUP / 2; offset > 0; offset /= 2) {
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
        }
        float sum = 0.0f;
        const float reference = highest == -infinity() ? 0.0f : highest;
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            sum += exp2_approx(kept[i] - reference);
        }
#pragma unroll 4
        for (int s = task % GROUP + KEPT * GROUP; s < w.num_splits; s += GROUP) {
            sum += exp2_approx(__ldcg(lse + s * split_stride) - reference);
        }
#pragma unroll
        for (int offset = GROUP / 2; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (task % GROUP == 0) {
            if constexpr (Variant::SINKS) {
                total[row] = end_row(variant, reference, sum, [&] { return output_row(p, w, row).head; }).lse;
            } else {
                total[row] = sum == 0.0f ? -infinity() : reference + log2_approx(sum);
            }
            if (in_tile) {
                store_lse(p, output_row(p, w, row), total[row]);
            }
        }
    }
}

// out = sum_s 2^(lse_s - lse) O_s, lse = log2 sum_s 2^lse_s, always summed in split order, so that the bits do not depend on who came last.
// Divided by the sum of the weights: of an lse of 1e6 and more rounding leaves too little for them to add up to 1 (with a sink it may be less, not more).
// `total`: TILE_Q floats of shared memory. THREADS threads from threadIdx.x 0 on take part
// (`thread`: fresh_thread() where registers are short). EARLY: splits fetched ahead, 5 registers each.
template <typename T, int HEAD_DIM, int TILE_Q, int THREADS, bool ALIGNED = true, int EARLY = 8, typename Params, typename Variant, typename Sync = BlockSync>
PYINFER_DEVICE void merge_splits(const Params& p, const AttentionWork& w, const Variant& variant, float* total, const Sync& sync = {},
                                 int thread = threadIdx.x) {
    const int64_t row_0 = partial_row<TILE_Q>(p, w, 0);
    const int64_t split_stride = static_cast<int64_t>(p.num_kv_heads) * TILE_Q;

    // A task is 4 columns of a row: neighbouring lanes read 16 bytes each of the same partial row. Of a thread's first task the first splits
    // are on their way while the rows' sums are made.
    constexpr int COLUMNS = 4;
    const int tasks = w.row_count * (HEAD_DIM / COLUMNS);
    const auto lse_of = [&](int task, int s) { return __ldcg(p.partial_lse + row_0 + task / (HEAD_DIM / COLUMNS) + s * split_stride); };
    const auto columns_of = [&](int task, int s) {
        const int64_t row = row_0 + task / (HEAD_DIM / COLUMNS) + s * split_stride;
        return __ldcg(reinterpret_cast<const float4*>(p.partial_o + row * HEAD_DIM + task % (HEAD_DIM / COLUMNS) * COLUMNS));
    };
    float early_lse[EARLY] = {};
    float4 early[EARLY] = {};
    if (thread < tasks) {
#pragma unroll
        for (int s = 0; s < EARLY; ++s) {
            if (s < w.num_splits) {
                early_lse[s] = lse_of(thread, s);
                early[s] = columns_of(thread, s);
            }
        }
    }

    merge_lse<TILE_Q, THREADS>(p, w, variant, total, thread);
    sync();

    for (int task = thread; task < tasks; task += THREADS) {
        const int row = task / (HEAD_DIM / COLUMNS);
        const int column = task % (HEAD_DIM / COLUMNS) * COLUMNS;
        const float reference = total[row] == -infinity() ? 0.0f : total[row];
        float sum[COLUMNS] = {};
        float weights = 0.0f;
        const auto add = [&](float lse, const float4& o) {
            float weight = 1.0f;
            if constexpr (Normalises<Variant>::value) {
                weight = exp2_approx(lse - reference);
            }
            weights += weight;
            sum[0] = fmaf(weight, o.x, sum[0]);
            sum[1] = fmaf(weight, o.y, sum[1]);
            sum[2] = fmaf(weight, o.z, sum[2]);
            sum[3] = fmaf(weight, o.w, sum[3]);
        };
        int first = 0;
        if (task == thread) {
#pragma unroll
            for (int s = 0; s < EARLY; ++s) {
                if (s < w.num_splits) {
                    add(early_lse[s], early[s]);
                }
            }
            first = EARLY;
        }
#pragma unroll EARLY
        for (int s = first; s < w.num_splits; ++s) {
            add(lse_of(task, s), columns_of(task, s));
        }
        const float factor = Normalises<Variant>::value ? normaliser(Variant::SINKS ? fmaxf(weights, 1.0f) : weights) : 1.0f;
        const OutputRow at = output_row(p, w, row);
        vec_t<T, COLUMNS> result;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            result[i] = from_float<T>(variant.output_transform(factor * sum[i], w, [&] { return at; }, column + i));
        }
        store_columns<ALIGNED>(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column, result);
    }
}

// The same for tiles of many rows, where registers are to be had: 8 splits of 128 x 128 are half a megabyte, and what a block has under way decides how long it
// reads that. A thread fetches SPLITS splits of TASKS rows at a time, 5 registers each.
template <typename T, int HEAD_DIM, int TILE_Q, int THREADS, bool ALIGNED, int TASKS, int SPLITS, typename Params, typename Variant>
PYINFER_DEVICE void merge_tall(const Params& p, const AttentionWork& w, const Variant& variant, float* total) {
    const int64_t row_0 = partial_row<TILE_Q>(p, w, 0);
    const int64_t split_stride = static_cast<int64_t>(p.num_kv_heads) * TILE_Q;
    merge_lse<TILE_Q, THREADS>(p, w, variant, total, threadIdx.x);
    __syncthreads();

    // A task is 4 columns of a row: neighbouring lanes read 16 bytes each of the same partial row.
    constexpr int COLUMNS = 4;
    constexpr int ROW_TASKS = HEAD_DIM / COLUMNS;
    const int tasks = w.row_count * ROW_TASKS;
    for (int first = threadIdx.x; first < tasks; first += TASKS * THREADS) {
        float sum[TASKS][COLUMNS] = {};
        float weights[TASKS] = {};
#pragma unroll 1
        for (int s = 0; s < w.num_splits; s += SPLITS) {
            float lse[TASKS][SPLITS];
            float4 o[TASKS][SPLITS];
#pragma unroll
            for (int k = 0; k < TASKS; ++k) {
                const int task = first + k * THREADS;
#pragma unroll
                for (int i = 0; i < SPLITS; ++i) {
                    if (task < tasks && s + i < w.num_splits) {
                        const int64_t row = row_0 + task / ROW_TASKS + (s + i) * split_stride;
                        lse[k][i] = __ldcg(p.partial_lse + row);
                        o[k][i] = __ldcg(reinterpret_cast<const float4*>(p.partial_o + row * HEAD_DIM + task % ROW_TASKS * COLUMNS));
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < TASKS; ++k) {
                const int task = first + k * THREADS;
                const float known = total[min_of(task, tasks - 1) / ROW_TASKS];
                const float reference = known == -infinity() ? 0.0f : known;
#pragma unroll
                for (int i = 0; i < SPLITS; ++i) {
                    if (task < tasks && s + i < w.num_splits) {
                        const float weight = Normalises<Variant>::value ? exp2_approx(lse[k][i] - reference) : 1.0f;
                        weights[k] += weight;
                        sum[k][0] = fmaf(weight, o[k][i].x, sum[k][0]);
                        sum[k][1] = fmaf(weight, o[k][i].y, sum[k][1]);
                        sum[k][2] = fmaf(weight, o[k][i].z, sum[k][2]);
                        sum[k][3] = fmaf(weight, o[k][i].w, sum[k][3]);
                    }
                }
            }
        }
#pragma unroll
        for (int k = 0; k < TASKS; ++k) {
            const int task = first + k * THREADS;
            if (task < tasks) {
                const int column = task % ROW_TASKS * COLUMNS;
                const float factor = Normalises<Variant>::value ? normaliser(Variant::SINKS ? fmaxf(weights[k], 1.0f) : weights[k]) : 1.0f;
                const OutputRow at = output_row(p, w, task / ROW_TASKS);
                vec_t<T, COLUMNS> result;
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    result[i] = from_float<T>(variant.output_transform(factor * sum[k][i], w, [&] { return at; }, column + i));
                }
                store_columns<ALIGNED>(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column, result);
            }
        }
    }
}
