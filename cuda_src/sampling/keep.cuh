// What a filter keeps of a row: the steps that select.cuh lists, put together.
#pragma once

#include "sampling/guess.cuh"

// Room for candidates, in words of shared memory: OWN_SLOTS rows of BLOCK, in which a thread has a column of its own, so that nothing is shared and no
// banks collide; behind them ASIDE_SLOTS rows for whoever has more, as where probable tokens have neighbouring ids; then whose those are, a byte each.
constexpr int OWN_SLOTS = SAMPLING_OWN_SLOTS, ASIDE_SLOTS = SAMPLING_ASIDE_SLOTS;
static_assert(OWN_SLOTS * BLOCK >= GUESS_BINS, "the bins lie where the candidates will");
static_assert(WARPS <= 256, "an owner is a byte");

struct KeepShared {
    SearchShared search;
    GuessShared guess;
    uint32_t num_aside;
};

// x is kept iff count(> x) < k and mass(> x) < top_p; with `in_turn`, top_p applies to what k keeps, renormalised.
struct Wanted {
    uint64_t k;
    float top_p;
    bool in_turn;

    PYINFER_DEVICE bool all() const { return k == UNLIMITED && !(top_p < 1.f); }
    PYINFER_DEVICE Filter first(int s) const { return Filter{k, in_turn ? UNLIMITED : top_p_units(top_p, s)}; }
    PYINFER_DEVICE bool has_second() const { return in_turn && top_p < 1.f; }
};

struct Candidates {
    uint32_t* room;
    uint32_t& num_aside;
    int own = 0;

    PYINFER_DEVICE uint32_t* aside() const { return room + OWN_SLOTS * BLOCK; }
    PYINFER_DEVICE uint8_t* owner() const { return reinterpret_cast<uint8_t*>(room + (OWN_SLOTS + ASIDE_SLOTS) * BLOCK); }
    PYINFER_DEVICE bool complete() const { return num_aside <= ASIDE_SLOTS * BLOCK; }

    PYINFER_DEVICE void append(uint32_t key) {
        if (own < OWN_SLOTS) {
            room[own++ * BLOCK + threadIdx.x] = key;
            return;
        }
        const uint32_t slot = atomicAdd(&num_aside, 1u);
        if (slot < ASIDE_SLOTS * BLOCK) {
            aside()[slot] = key;
            owner()[slot] = static_cast<uint8_t>(warp_id());
        }
    }
    // f(key) for every candidate, by one thread of the block.
    template <typename F>
    PYINFER_DEVICE void walk(F&& f) const {
        const int rows_aside = ceil_div(max_of(static_cast<int>(num_aside) - static_cast<int>(threadIdx.x), 0), BLOCK);
#pragma unroll 1
        for (int i = 0; i < own + rows_aside; i++) {
            f(room[(i < own ? i : OWN_SLOTS + i - own) * BLOCK + threadIdx.x]);
        }
    }
    // This thread's share of the mass of keys >= lowest in its warp's run.
    PYINFER_DEVICE uint64_t own_mass(uint32_t lowest, int s) const {
        MassSum sum(s);
        const auto add = [&](uint32_t key) {
            sum.add(key >= lowest ? key : 0u);
            sum.close();
        };
#pragma unroll 1
        for (int i = 0; i < own; i++) {
            add(room[i * BLOCK + threadIdx.x]);
        }
#pragma unroll 1
        for (int i = lane_id(); i < static_cast<int>(num_aside); i += 32) {
            add(owner()[i] == warp_id() ? aside()[i] : 0u);
        }
        return sum.units;
    }
};

// Searches for the boundary among `keys`; then, for `wanted.has_second()`, for the second one. False: a boundary is not in the range.
template <typename Keys>
PYINFER_DEVICE bool search_in_turn(const Keys& keys, const Wanted& wanted, Range range, int s, SearchShared& sh, Selection& kept) {
    Filter filter = wanted.first(s);
#pragma unroll 1
    for (int turn = 0;; turn++) {  // a loop, for the search to be compiled once
        if (!filter.accepts(range.count_above, range.mass_above)) {
            return false;
        }
        kept = search<true>(keys, filter, range, s, sh);
        if (range.low > LOWEST_KEY && filter.accepts(kept.count, kept.mass)) {
            return false;
        }
        if (turn == 1 || !wanted.has_second()) {
            return true;
        }
        filter = Filter{UNLIMITED, top_p_share(wanted.top_p, kept.mass)};
        range.low = kept.lowest;
    }
}

struct Kept {
    uint32_t top;  // the row's largest key; the rest says nothing where it is 0, or INF_BITS and more (an impossible value)
    int s;  // masses are in units of 2^-s
    uint32_t lowest;  // kept are the keys >= lowest
    uint64_t mass;
    uint64_t own_mass;  // this thread's share of the mass of what is kept of its warp's run

    PYINFER_DEVICE bool valid() const { return top > 0u && top < INF_BITS; }
};

// room: shared memory, (OWN_SLOTS + ASIDE_SLOTS) * BLOCK words and ASIDE_SLOTS * BLOCK bytes. All threads call it.
template <typename T, typename Source>
PYINFER_DEVICE Kept keep(const RowKeys<T, Source>& keys, const Wanted& wanted, uint32_t* room, KeepShared& sh) {
    Kept kept{0u, SCALE_BITS, LOWEST_KEY, 0, 0};
    Range range{LOWEST_KEY, 0u};  // everything is above it
    if (!wanted.all()) {
        range.high = HIGHEST_KEY;
        if (ceil_div(keys.row.run(), 32) * Row<T>::VEC > OWN_SLOTS) {
            range = guess(keys, wanted.first(SCALE_BITS), room, sh.guess);
            range.high = wanted.has_second() ? HIGHEST_KEY : range.high;  // the second boundary lies above the first
        }
    }

    MassSum above(SCALE_BITS);
    uint32_t own_count = 0;
    Candidates candidates{room, sh.num_aside};
    if (threadIdx.x == 0) {
        sh.num_aside = 0;
    }
    __syncthreads();
    keys.walk_run(
        [&](uint32_t key) {
            kept.top = max_of(kept.top, key);
            if (key > range.high) {
                own_count++;
                above.add(key);
            } else if (key >= range.low) {
                candidates.append(key);
            }
        },
        [&] { above.close(); });
    kept.top = block_max(kept.top, sh.search.scratch);
    if (!kept.valid()) {
        return kept;
    }
    kept.s = scale_exponent(kept.top);
    kept.own_mass = above.units;
    range.count_above = static_cast<uint32_t>(block_sum(own_count, sh.search.scratch));
    range.mass_above = block_sum(above.units, sh.search.scratch);
    range.high = min_of(range.high, kept.top);

    const bool any = __syncthreads_or(candidates.own > 0);
    Selection boundary{LOWEST_KEY, range.count_above, range.mass_above};
    const bool weighed = kept.s == SCALE_BITS;  // by the right measure
    if (weighed && any && candidates.complete() && search_in_turn(candidates, wanted, range, kept.s, sh.search, boundary)) {
        kept.own_mass += candidates.own_mass(boundary.lowest, kept.s);
    } else if (!weighed || !wanted.all()) {
        if (!wanted.all()) {
            search_in_turn(keys, wanted, Range{LOWEST_KEY, kept.top}, kept.s, sh.search, boundary);
        }
        kept.own_mass = keys.own_mass(boundary.lowest, kept.s);
        boundary.mass = block_sum(kept.own_mass, sh.search.scratch);
    }
    kept.lowest = boundary.lowest;
    kept.mass = boundary.mass;
    return kept;
}
