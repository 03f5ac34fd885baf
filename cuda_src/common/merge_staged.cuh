// The merge of a tile's KV splits by the block that came last (`arrive_last`), for few rows and many splits: partial results travel to shared memory all at once,
// so that one trip to L2 is waited for, not one for every few splits that a thread's registers hold (merge.cuh), and the code is small, which counts where it is
// fetched to be run once.
#pragma once
#include "common/merge.cuh"
#include "common/ptx_cp_async.cuh"

// FLOATS of shared memory, aligned to 16 bytes.
template <int TILE_Q, int HEAD_DIM, int FLOATS>
struct MergeStage {
    static constexpr int ROOM = FLOATS - TILE_Q * (HEAD_DIM + 3);
    static_assert(ROOM >= TILE_Q * (HEAD_DIM + 1), "one split of all rows fits");
    float4 value[TILE_Q * HEAD_DIM / 4];  // of a task, if there are more splits than find room at once
    float reference[TILE_Q];              // of the row so far: everything is relative to 2^reference
    float sum[TILE_Q];
    float rescale[TILE_Q];  // of what was added before, as the reference grew
    float room[ROOM];  // weights [split][TILE_Q], then results [split][row][HEAD_DIM]
};

// out = sum_s 2^lse_s O_s / sum_s 2^lse_s, summed in split order. All THREADS threads of the block call it; nothing else uses `stage`.
template <typename T, int THREADS, bool ALIGNED, int TILE_Q, int HEAD_DIM, int FLOATS, typename Params, typename Variant>
PYINFER_DEVICE void merge_staged(const Params& p, const AttentionWork& w, const Variant& variant, MergeStage<TILE_Q, HEAD_DIM, FLOATS>& stage) {
    constexpr int COLUMNS = 4;  // of one row: a task
    constexpr int ROW_TASKS = HEAD_DIM / COLUMNS;
    const int lane = threadIdx.x % 32;
    const int tasks = w.row_count * ROW_TASKS;
    const int at_once = stage.ROOM / (TILE_Q + tasks * COLUMNS);  // splits
    float* const weights = stage.room;
    float* const results = stage.room + at_once * TILE_Q;
    const int64_t split_stride = static_cast<int64_t>(p.num_kv_heads) * TILE_Q;  // rows

#pragma unroll 1
    for (int first = 0; first < w.num_splits; first += at_once) {
        const int splits = min_of(at_once, w.num_splits - first);
        const int64_t row_0 = partial_row<TILE_Q>(p, w, first);
#pragma unroll 1
        for (int task = threadIdx.x; task < tasks; task += THREADS) {
            const float* from = p.partial_o + row_0 * HEAD_DIM + task * COLUMNS;
            uint32_t to = smem_address(results + task * COLUMNS);
#pragma unroll 4
            for (int s = 0; s < splits; ++s) {
                cp_async_16(to, from, true);
                from += split_stride * HEAD_DIM;
                to += tasks * 16;
            }
        }
        cp_async_commit();
#pragma unroll 2
        for (int i = threadIdx.x; i < splits * TILE_Q; i += THREADS) {
            weights[i] = i % TILE_Q < w.row_count ? __ldcg(p.partial_lse + row_0 + i / TILE_Q * split_stride + i % TILE_Q) : 0.0f;
        }
        __syncthreads();
        // ---- a warp turns a row's LSEs into weights ----
#pragma unroll 1
        for (int row = threadIdx.x / 32; row < w.row_count; row += THREADS / 32) {
            float highest = -infinity();
#pragma unroll 1
            for (int s = lane; s < splits; s += 32) {
                highest = fmaxf(highest, weights[s * TILE_Q + row]);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
            }
            const float before = first == 0 ? -infinity() : stage.reference[row];
            const float reference = fmaxf(highest, before);
            float sum = 0.0f;
#pragma unroll 1
            for (int s = lane; s < splits; s += 32) {
                float& weight = weights[s * TILE_Q + row];
                weight = reference == -infinity() ? 0.0f : exp2_approx(weight - reference);
                sum += weight;
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            }
            __syncwarp();  // all lanes have read the reference
            if (lane == 0) {
                const float rescale = before == -infinity() ? 0.0f : exp2_approx(before - reference);
                stage.sum[row] = before == -infinity() ? sum : fmaf(stage.sum[row], rescale, sum);
                stage.rescale[row] = rescale;
                stage.reference[row] = reference;
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        const bool done = first + at_once >= w.num_splits;
#pragma unroll 1
        for (int task = threadIdx.x; task < tasks; task += THREADS) {
            const int row = task / ROW_TASKS;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (first > 0) {
                const float rescale = stage.rescale[row];
                const float4 x = stage.value[task];
                value = make_float4(x.x * rescale, x.y * rescale, x.z * rescale, x.w * rescale);
            }
#pragma unroll 4
            for (int s = 0; s < splits; ++s) {
                const float weight = weights[s * TILE_Q + row];
                const float4 x = *reinterpret_cast<const float4*>(results + (s * tasks + task) * COLUMNS);
                value.x = fmaf(weight, x.x, value.x);
                value.y = fmaf(weight, x.y, value.y);
                value.z = fmaf(weight, x.z, value.z);
                value.w = fmaf(weight, x.w, value.w);
            }
            if (!done) {
                stage.value[task] = value;
                continue;
            }
            const int column = task % ROW_TASKS * COLUMNS;
            const OutputRow at = output_row(p, w, row);
            const RowEnd end = end_row(variant, stage.reference[row], stage.sum[row], [&] { return at.head; });
            const float x[COLUMNS] = {value.x, value.y, value.z, value.w};
            vec_t<T, COLUMNS> result;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                result[j] = from_float<T>(variant.output_transform(x[j] * end.factor, w, [&] { return at; }, column + j));
            }
            store_columns<ALIGNED>(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column, result);
            if (column == 0) {
                store_lse(p, at, end.lse);
            }
        }
        if (!done) {
            __syncthreads();  // all have read what the next splits replace
        }
    }
}
