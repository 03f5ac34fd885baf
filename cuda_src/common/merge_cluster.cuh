// The merge of a tile's KV splits by the cluster of blocks that made them (sm_90): each block sends its part of every task straight into the shared memory of
// the task's owner, and after one barrier of the cluster the owners add up what lies there.
//
// Why not through global memory (merge.cuh): there a block's results pass a fence, an atomic and two reads of L2, some 2.4 us on an H200, most of what is left of
// a short launch. Why not let the owners read the others' shared memory: that is a trip more, and a second barrier, before which no block may leave.
#pragma once
#include "common/merge.cuh"
#include "common/ptx_cluster.cuh"

// What the splits send to one owner. A task is 4 columns of a row; owners take runs of tasks. The inbox must not overlap what a block uses before the barrier.
template <int CLUSTER, int ROWS, int HEAD_DIM>
struct ClusterInbox {
    static constexpr int COLUMNS = 4;
    static constexpr int ROW_TASKS = HEAD_DIM / COLUMNS;
    static constexpr int MOST = ceil_div(ROWS * ROW_TASKS, CLUSTER);
    float4 value[CLUSTER][MOST];  // by split
    float2 scale[CLUSTER][MOST];  // the row's reference and sum in that split

    PYINFER_DEVICE static int share(const AttentionWork& w) { return ceil_div(w.row_count * ROW_TASKS, CLUSTER); }

    // A split's part of a task, relative to 2^reference, not normalised. All blocks of the cluster must have begun.
    PYINFER_DEVICE void send(const AttentionWork& w, int task, const float (&x)[COLUMNS], float reference, float sum) {
        const int owner = task / share(w);
        const int at = task - owner * share(w);
        store_cluster(cluster_address(&value[w.split][at], owner), make_float4(x[0], x[1], x[2], x[3]));
        store_cluster(cluster_address(&scale[w.split][at], owner), make_float2(reference, sum));
    }

    // Adds up this block's tasks in split order and writes them. All threads of the cluster call it; split s was sent by the block of rank s.
    template <typename T, int THREADS, bool ALIGNED, typename Params, typename Variant>
    PYINFER_DEVICE void merge(const Params& p, const AttentionWork& w, const Variant& variant) const {
        cluster_sync();
        const int first = w.split * share(w);
        for (int task = first + threadIdx.x; task < min_of(first + share(w), w.row_count * ROW_TASKS); task += THREADS) {
            const int column = task % ROW_TASKS * COLUMNS;
            const OutputRow at = output_row(p, w, task / ROW_TASKS);
            float reference = -infinity();
#pragma unroll
            for (int s = 0; s < CLUSTER; ++s) {
                reference = fmaxf(reference, scale[s][task - first].x);
            }
            float sum = 0.0f;
            float result[COLUMNS] = {};
#pragma unroll
            for (int s = 0; s < CLUSTER; ++s) {
                const float2 of_split = scale[s][task - first];
                const float weight = !Normalises<Variant>::value ? 1.0f : reference == -infinity() ? 0.0f : exp2_approx(of_split.x - reference);
                const float4 x = value[s][task - first];
                sum = fmaf(weight, of_split.y, sum);
                result[0] = fmaf(weight, x.x, result[0]);
                result[1] = fmaf(weight, x.y, result[1]);
                result[2] = fmaf(weight, x.z, result[2]);
                result[3] = fmaf(weight, x.w, result[3]);
            }
            const RowEnd end = end_row(variant, reference, sum, [&] { return at.head; });
            vec_t<T, COLUMNS> out;
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                out[i] = from_float<T>(variant.output_transform(result[i] * end.factor, w, [&] { return at; }, column + i));
            }
            store_columns<ALIGNED>(p.out + at.token * p.out_stride_token + at.head * p.out_stride_head + column, out);
            if (column == 0) {
                store_lse(p, at, end.lse);
            }
        }
    }
};
