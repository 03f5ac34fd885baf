// The work items of a persistent attention kernel whose warps have roles.
#pragma once
#include "common/attention_variant.cuh"

// A work item as the roles read it. Its keys are tiles of TILE_KV from first_key on, which begin where boxes do: of a paged cache, a box is part of one
// page. An item without keys has one tile, all masked, so that no role needs a case of its own.
template <int TILE_KV>
struct alignas(16) BlockWork : AttentionWork {
    int first_key;
    int num_tiles;
    int length;  // of the request: keys from here on are others'
    PYINFER_DEVICE int tile_begin(int i) const { return first_key + (num_tiles - 1 - i) * TILE_KV; }  // i-th tile from the end
    // Keys of that tile that are the request's own.
    PYINFER_DEVICE int valid_keys(int i) const { return kv_end > kv_begin ? length - tile_begin(i) : 0; }
};

// Which item, of all, a block does in its n-th round. Items are sorted longest first, so rounds go through the blocks forth and back.
PYINFER_DEVICE int item_of_round(int round) {
    const int grid = gridDim.x;
    const int block = blockIdx.x;
    return round * grid + (round & 1 ? grid - 1 - block : block);
}

// The place of the index-th item among all items x kv heads, kv head fastest: all items of heads_at_once kv heads, then those of the next ones. Blocks
// that run together share keys, which then come from L2.
template <typename Params>
PYINFER_DEVICE int place_of_item(const Params& p, int index, int items) {
    const int section = index / (items * p.heads_at_once);
    const int first_head = section * p.heads_at_once;
    const int heads = min_of(p.heads_at_once, p.num_kv_heads - first_head);
    const int place = index - items * first_head;
    return place / heads * p.num_kv_heads + first_head + place % heads;
}
