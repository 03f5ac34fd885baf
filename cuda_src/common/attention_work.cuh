// What a block does: one tile of packed rows against one range of keys, for one kv head. From a plan's work list, or, for few requests of one token each and for
// a single request, by arithmetic.
#pragma once
#include "common/paged_kv.cuh"
#include "common/ptx_sync.cuh"

struct AttentionWork {
    int request;
    int kv_head;
    int row_begin;  // first packed row, within the request
    int row_count;  // 0: this block has nothing to do
    int kv_begin;  // keys [kv_begin, kv_end)
    int kv_end;
    int split;
    int num_splits;
    int slot;  // of split 0 in the partial buffers
    int semaphore;  // row of the semaphore array
    int qo_begin;  // the request's first query token in q, out and lse
    int kv_base;  // its first page table entry, or (ragged) its first token in k and v
    int diagonal;  // kv_len - qo_len
};

// Starts the fetch of what is read after the item that names the request, while that is read: the requests' page ranges and lengths (three sections
// side by side, `entries` int32 each), and the page table, of which every block fetches a line for all. From a cold L2 that saves two trips to memory.
template <typename Params>
PYINFER_DEVICE void prefetch_tables(const Params& p, uint32_t block) {
    const int entries = static_cast<int>(p.kv_indptr - p.qo_indptr);
    for (int i = threadIdx.x * 32; i < entries; i += blockDim.x * 32) {
        prefetch_l2(p.qo_indptr + i);
        prefetch_l2(p.kv_indptr + i);
        if (i < entries - 4) {  // kv_len has one entry less: the last may lie behind the buffer
            prefetch_l2(p.kv_len + i);
        }
    }
    if (threadIdx.x == 0 && block < static_cast<uint32_t>(p.num_indices + 31) / 32) {
        prefetch_l2(p.kv_indices + block * 32);
    }
}

// A plan's item for one kv head. A graph's grid is as large as the plan's capacity: items from n_work on are empty.
template <typename Params>
PYINFER_DEVICE AttentionWork planned_work(const Params& p, int item, int kv_head) {
    AttentionWork w;
    w.kv_head = kv_head;
    // Everything is read before anything is decided, so that the reads overlap; rows behind n_work are zeros.
    const int n_work = p.plan_header[0];
    const int4 head = reinterpret_cast<const int4*>(p.work)[2 * item];
    const int4 tail = reinterpret_cast<const int4*>(p.work)[2 * item + 1];
    w.request = head.x, w.row_begin = head.y, w.row_count = head.z, w.kv_begin = head.w;
    w.kv_end = tail.x, w.split = tail.y, w.num_splits = tail.z, w.slot = w.semaphore = tail.w;
    w.qo_begin = p.qo_indptr[w.request];
    w.kv_base = p.kv_indptr[w.request];
    w.diagonal = p.kv_len[w.request] - (p.qo_indptr[w.request + 1] - w.qo_begin);
    if (item >= n_work) {
        w.row_count = 0;
    }
    return w;
}
// block = item * num_kv_heads + kv_head.
template <typename Params>
PYINFER_DEVICE AttentionWork planned_work(const Params& p, uint32_t block = blockIdx.x) {
    const int item = block / p.num_kv_heads;
    return planned_work(p, item, static_cast<int>(block) - item * p.num_kv_heads);
}

// Where a request's keys are: its first page table entry (or ragged token), and how many tokens they are; length -1: there is no such request.
struct KeyRange {
    int base;
    int length;
};
// Of few requests, out of the launch itself (p.table: kv_indptr, then at word p.len_at kv_len): nothing is read from memory.
template <typename Params>
PYINFER_DEVICE KeyRange launched_range(const Params& p, int request) {
    const auto word = [&](int i) { return static_cast<int32_t>(p.table[i / 2] >> (i % 2 * 32)); };
    return {word(request), word(p.len_at + request)};
}
// Out of the plan, as it is now.
template <typename Params>
PYINFER_DEVICE KeyRange planned_range(const Params& p, int request) {
    const int batch = p.plan_header[2];
    const KeyRange keys = {p.kv_indptr[request], p.kv_len[request]};
    return {keys.base, request < batch ? keys.length : -1};
}

// One query token a request, each request in PIECES of one size, multiples of UNIT keys.
// block = (request * num_kv_heads + kv_head) * PIECES + piece: a request's pieces are a cluster.
template <int PIECES, int UNIT, typename Params, typename RangeOf>
PYINFER_DEVICE AttentionWork even_work(const Params& p, uint32_t block, const RangeOf& range_of) {
    AttentionWork w;
    const int pair = block / PIECES;
    w.request = w.qo_begin = pair / p.num_kv_heads;
    w.kv_head = pair - w.request * p.num_kv_heads;
    const KeyRange keys = range_of(w.request);
    w.row_begin = w.slot = w.semaphore = 0;
    w.row_count = keys.length < 0 ? 0 : p.group;
    w.kv_base = keys.base;
    w.diagonal = keys.length - 1;
    const int begin = p.window_left >= 0 ? max_of(0, w.diagonal - p.window_left) : 0;
    const int piece = PIECES == 1 ? keys.length : ceil_div(ceil_div(keys.length - begin, PIECES), UNIT) * UNIT;
    w.split = block % PIECES;
    w.num_splits = PIECES;
    w.kv_begin = min_of(begin + w.split * piece, keys.length);
    w.kv_end = min_of(w.kv_begin + piece, keys.length);
    return w;
}

// item = tile * num_splits + split, for one kv head. Under causality the last tile sees most keys, so it goes
// first. A tile has as many splits as its own visible keys need; the others are empty.
template <int TILE_Q, typename Params>
PYINFER_DEVICE AttentionWork single_work(const Params& p, int item, int kv_head) {
    AttentionWork w;
    const int rows = p.qo_len * p.group;
    const int num_tiles = ceil_div(rows, TILE_Q);
    w.kv_head = kv_head;
    const int tile = num_tiles - 1 - item / p.num_splits;
    w.split = item % p.num_splits;
    w.request = w.qo_begin = w.kv_base = 0;
    w.diagonal = p.kv_len - p.qo_len;
    w.row_begin = tile * TILE_Q;
    w.row_count = min_of(TILE_Q, rows - w.row_begin);

    const int first_token = fast_divide(w.row_begin, p.group_magic, p.group_shift);
    const int last_token = fast_divide(w.row_begin + w.row_count - 1, p.group_magic, p.group_shift);
    const int begin = p.window_left >= 0 ? max_of(0, w.diagonal + first_token - p.window_left) : 0;
    const int end = max_of(begin, p.causal ? min_of(p.kv_len, w.diagonal + last_token + 1) : p.kv_len);
    w.num_splits = p.num_splits == 1 ? 1 : max_of(1, ceil_div(end - begin, p.kv_chunk));
    w.slot = tile * p.num_splits;
    w.semaphore = tile;
    if (w.split >= w.num_splits) {
        w.row_count = 0;
        return w;
    }
    w.kv_begin = p.num_splits == 1 ? begin : begin + w.split * p.kv_chunk;
    w.kv_end = p.num_splits == 1 ? end : min_of(end, w.kv_begin + p.kv_chunk);
    return w;
}
// block = item * num_kv_heads + kv_head.
template <int TILE_Q, typename Params>
PYINFER_DEVICE AttentionWork single_work(const Params& p, uint32_t block = blockIdx.x) {
    const int item = block / p.num_kv_heads;
    return single_work<TILE_Q>(p, item, static_cast<int>(block) - item * p.num_kv_heads);
}
