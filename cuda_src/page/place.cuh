// Where tokens lie in a paged cache: what the kernels share that write one or read one token by token.
#pragma once
#include "common/index.cuh"
#include "common/types.cuh"

// Bits of p.wide: which index arrays are int64. Other kernels' own bits begin at 16.
enum Wide { BATCH_INDICES = 1, POSITIONS = 2, KV_INDICES = 4, KV_INDPTR = 8 };

struct Place {
    int64_t page;  // -1: nowhere
    uint32_t slot;
};

// What a token is of, and where there: to be loaded early, beside whatever else waits for nothing.
struct TokenIndex {
    int64_t request, position;
};

template <typename Params>
PYINFER_DEVICE TokenIndex token_index(const Params& p, uint32_t token) {
    return {load_index(p.batch_indices, token, p.wide & BATCH_INDICES), load_index(p.positions, token, p.wide & POSITIONS)};
}

// Page kv_indices[kv_indptr[b] + position / page_size], slot position % page_size, b = batch_indices[token]. A token without a place (negative batch index or
// position, a position beyond the request's pages, a page the cache does not have) gets page -1: it must not land in another request's page.
template <typename Params>
PYINFER_DEVICE Place place_of(const Params& p, const TokenIndex& token) {
    const auto [request, position] = token;
    if (request < 0 || request >= p.batch || position < 0 || position > 0x7fffffff) {
        return {-1, 0};
    }
    const uint32_t nth = static_cast<uint32_t>(position) / p.page_size, slot = static_cast<uint32_t>(position) % p.page_size;
    const int64_t entry = load_index(p.kv_indptr, request, p.wide & KV_INDPTR) + nth;
    if (entry >= load_index(p.kv_indptr, request + 1, p.wide & KV_INDPTR) || entry < 0 || entry >= p.num_indices) {
        return {-1, 0};
    }
    const int64_t page = load_index(p.kv_indices, entry, p.wide & KV_INDICES);
    return {page < p.num_pages ? page : -1, slot};
}
