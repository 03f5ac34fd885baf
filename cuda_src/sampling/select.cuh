// The value of a row from which on a filter keeps tokens, found exactly and without sorting.
//
// A filter accepts value x iff count(> x) < k and mass(> x) < limit. Acceptance is monotone in x, so it is settled by a radix selection from the top
// digit: histogram the digit over the elements of the current bin, then descend into the lowest non-empty bin whose largest value is still accepted.
// Counts and masses are integers: the result depends neither on the order of the atomics nor on how the work is split.
//
// The first look at a row counts only (one shared-memory increment an element: the hardware merges increments of one address). Counts bound the
// masses from both sides, which leaves few candidates as a rule: they are copied to shared memory, and the exact search runs on them.
#pragma once

#include "sampling/row.cuh"

constexpr int DIGITS = 2048;  // bins of a histogram: 11, 11 and 10 bits of the key
constexpr int TOP_SHIFT = 21;
constexpr int MAX_CANDIDATES = 4096;
constexpr uint32_t HIGHEST_KEY = 0xffffffffu;

struct SelectShared {
    uint32_t count[DIGITS];
    uint32_t mass_low[DIGITS];  // sums of the low and high 12 bits of Mass::digits: with up to 2^18 elements neither overflows
    uint32_t mass_high[DIGITS];
    uint32_t candidates[MAX_CANDIDATES];
    uint32_t num_candidates;
    uint32_t digit, sure_digit;  // results of a scan over the bins
    uint64_t count_above, mass_above, count_in, mass_in;
    BlockScratch scratch;
};

// Elements to search: a row in global memory, or the candidates. walk(f) calls f(key).
template <typename T, typename Source>
struct RowKeys {
    const Row<T>& row;
    const Source& source;

    // Uniform in a warp, by whole vectors.
    template <typename F>
    PYINFER_DEVICE void walk_vectors(F&& f) const {
        row.template walk<Source::DEPTH>(0, row.num_vecs, threadIdx.x, BLOCK, Source::fill(), [&](T x, int) { f(source.key(x)); });
    }
    // By single elements: the search's long f is there four times only, or it would be most of the kernel's compile time.
    template <typename F>
    PYINFER_DEVICE void walk(F&& f) const {
        constexpr int DEPTH = 4;
        for (int i = row.begin + static_cast<int>(threadIdx.x); i < row.end; i += BLOCK * DEPTH) {
            T x[DEPTH];
#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                x[u] = i + u * BLOCK < row.end ? row.base[i + u * BLOCK] : Source::fill();
            }
#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                f(source.key(x[u]));
            }
        }
    }
};
struct CandidateKeys {
    const uint32_t* keys;
    int size;

    template <typename F>
    PYINFER_DEVICE void walk(F&& f) const {
        for (int i = threadIdx.x; i < size; i += BLOCK) {
            f(keys[i]);
        }
    }
};

PYINFER_DEVICE void clear_bins(uint32_t* bins) {
#pragma unroll
    for (int i = 0; i < DIGITS / BLOCK; i++) {
        bins[threadIdx.x + i * BLOCK] = 0u;
    }
}

struct Selection {
    uint32_t lowest;  // accepted are the keys >= lowest
    uint64_t mass;  // of the accepted elements
};

// The exact search over the keys in [low, ...]. Keys above `high` are known to be accepted, and to lie above the boundary's bin. All threads call it.
template <bool WITH_MASS, int LEVELS, typename Keys>
PYINFER_DEVICE Selection search(const Keys& keys, const Filter& filter, uint32_t low, uint32_t high, int s, SelectShared& sh) {
    uint64_t count_above = 0, mass_above = 0;
    uint32_t base = 0;
    int shift = TOP_SHIFT;
#pragma unroll 1
    for (int level = 0; level < LEVELS; level++) {
        clear_bins(sh.count);
        if constexpr (WITH_MASS) {
            clear_bins(sh.mass_low);
            clear_bins(sh.mass_high);
        }
        __syncthreads();
        uint64_t own_count = 0, own_mass = 0;  // above `high`, on the first level; later levels have them in count_above, mass_above
        keys.walk([&](uint32_t key) {
            if (key > high) {
                if (level == 0) {
                    own_count += 1;
                    own_mass += WITH_MASS ? mass_of(bits_of_key(key), s).units() : 0;
                }
            } else if (key >= low) {
                const uint32_t digit = (key - base) >> shift;
                atomicAdd(&sh.count[digit], 1u);
                if constexpr (WITH_MASS) {
                    const uint32_t digits = mass_of(bits_of_key(key), s).digits;
                    atomicAdd(&sh.mass_low[digit], digits & 0xfffu);
                    atomicAdd(&sh.mass_high[digit], digits >> 12);
                }
            }
        });
        if (level == 0 && high != HIGHEST_KEY) {
            count_above = block_sum(own_count, sh.scratch);
            mass_above = WITH_MASS ? block_sum(own_mass, sh.scratch) : 0;
        }
        __syncthreads();  // the histogram is complete

        // Thread t looks at bins 2047 - 2t and 2046 - 2t: an exclusive scan over the threads is a sum over higher bins.
        const int first = DIGITS - 1 - 2 * static_cast<int>(threadIdx.x);
        uint64_t count[2], mass[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t digit = first - i;
            count[i] = sh.count[digit];
            if constexpr (WITH_MASS) {
                const uint64_t digits = (static_cast<uint64_t>(sh.mass_high[digit]) << 12) + sh.mass_low[digit];
                // 63: an empty bin above the row's largest value
                mass[i] = digits << min_of(mass_shift(bits_of_key(base + (digit << shift)), s), 63);
            }
        }
        uint64_t all_counts, all_masses = 0;
        uint64_t above = count_above + block_exclusive_scan(count[0] + count[1], sh.scratch, all_counts);
        uint64_t above_mass = mass_above;
        if constexpr (WITH_MASS) {
            above_mass += block_exclusive_scan(mass[0] + mass[1], sh.scratch, all_masses);
        }
        all_counts += count_above;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint64_t count_in = above + count[i], mass_in = above_mass + mass[i];
            // The lowest accepted bin is the one after which nothing is accepted, or nothing is left: exactly one thread finds it.
            if (count[i] > 0 && filter.accepts(above, above_mass) && (!filter.accepts(count_in, mass_in) || count_in == all_counts)) {
                sh.digit = first - i;
                sh.count_above = above;
                sh.mass_above = above_mass;
                sh.count_in = count_in;
                sh.mass_in = mass_in;
            }
            above = count_in;
            above_mass = mass_in;
        }
        __syncthreads();
        count_above = sh.count_above;
        mass_above = sh.mass_above;
        base += sh.digit << shift;
        low = max_of(low, base);
        high = base + ((1u << shift) - 1u);
        // No further look where the bin holds one element or is accepted as a whole: the elements above its smallest value are fewer than count_in
        // and weigh less than mass_in.
        const bool settled = sh.count_in - count_above == 1 || (sh.count_in <= filter.k && sh.mass_in <= filter.limit);
        if (settled || level == LEVELS - 1) {
            break;
        }
        shift = shift == TOP_SHIFT ? 10 : 0;
    }
    const Selection selection{low, sh.mass_in};
    __syncthreads();  // the next search may write the results again
    return selection;
}

// Bounds from counts alone: every accepted key is >= low, the boundary's bin is not above high; `candidates` keys are >= low.
struct Bracket {
    uint32_t low, high;
    uint32_t candidates;
};

// sh.count holds the top digits' histogram of all positive keys, at least one. All threads call it.
PYINFER_DEVICE Bracket bracket(const Filter& filter, int s, SelectShared& sh) {
    const int first = DIGITS - 1 - 2 * static_cast<int>(threadIdx.x);
    uint64_t count[2], least[2], most[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t lower_edge = static_cast<uint32_t>(first - i) << TOP_SHIFT;
        count[i] = sh.count[first - i];
        least[i] = count[i] * mass_of(bits_of_key(lower_edge), s).units();
        most[i] = count[i] ? count[i] * mass_of(bits_of_key(lower_edge | ((1u << TOP_SHIFT) - 1u)), s).units() : 0;
    }
    uint64_t all, unused;
    uint64_t above = block_exclusive_scan(count[0] + count[1], sh.scratch, all);
    uint64_t above_least = block_exclusive_scan(least[0] + least[1], sh.scratch, unused);
    uint64_t above_most = block_exclusive_scan(most[0] + most[1], sh.scratch, unused);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint64_t count_in = above + count[i];
        const bool last = count_in == all;
        if (count[i] > 0 && filter.accepts(above, above_least) && (!filter.accepts(count_in, above_least + least[i]) || last)) {
            sh.digit = first - i;  // the lowest bin that may hold accepted values
            sh.count_in = count_in;
        }
        if (count[i] > 0 && filter.accepts(above, above_most) && (!filter.accepts(count_in, above_most + most[i]) || last)) {
            sh.sure_digit = first - i;  // the lowest bin that is certain to
        }
        above = count_in;
        above_least += least[i];
        above_most += most[i];
    }
    __syncthreads();
    const Bracket result{max_of(sh.digit << TOP_SHIFT, LOWEST_KEY), (sh.sure_digit << TOP_SHIFT) | ((1u << TOP_SHIFT) - 1u),
                         static_cast<uint32_t>(sh.count_in)};
    __syncthreads();
    return result;
}

// Copies the keys >= low to shared memory, in no particular order: at most MAX_CANDIDATES of them. All threads call it.
template <typename Keys>
PYINFER_DEVICE CandidateKeys collect(const Keys& keys, uint32_t low, SelectShared& sh) {
    if (threadIdx.x == 0) {
        sh.num_candidates = 0;
    }
    __syncthreads();
    keys.walk_vectors([&](uint32_t key) {
        const uint32_t takers = __ballot_sync(ALL_LANES, key >= low);
        if (takers != 0) {
            uint32_t slot = 0;
            if (lane_id() == 0) {
                slot = atomicAdd(&sh.num_candidates, static_cast<uint32_t>(__popc(takers)));
            }
            slot = __shfl_sync(ALL_LANES, slot, 0) + __popc(takers & ((1u << lane_id()) - 1u));
            if (key >= low) {
                sh.candidates[slot] = key;
            }
        }
    });
    __syncthreads();
    return CandidateKeys{sh.candidates, static_cast<int>(sh.num_candidates)};
}

// One search, or two (top-k first): `then_top_p` below 1 is applied to what `filter` keeps, renormalised.
template <int LEVELS, typename Keys>
PYINFER_DEVICE Selection search_in_turn(const Keys& keys, Filter filter, float then_top_p, uint32_t low, uint32_t high, int s, SelectShared& sh) {
    Selection kept{low, 0};
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {  // a loop, for the search to be compiled once
        kept = search<true, LEVELS>(keys, filter, kept.lowest, high, s, sh);
        if (!(then_top_p < 1.f)) {
            break;
        }
        filter = Filter{UNLIMITED, top_p_share(then_top_p, kept.mass)};
        then_top_p = 1.f;
        high = HIGHEST_KEY;
    }
    return kept;
}

// The search over a row whose top-digit histogram stands in sh.count: on the candidates if they fit, else on the row. All threads call it.
template <int LEVELS, typename Keys>
PYINFER_DEVICE Selection select_row(const Keys& keys, const Filter& filter, float then_top_p, int s, SelectShared& sh) {
    const Bracket b = bracket(filter, s, sh);
    if (b.candidates <= MAX_CANDIDATES) {
        return search_in_turn<LEVELS>(collect(keys, b.low, sh), filter, then_top_p, b.low, HIGHEST_KEY, s, sh);
    }
    return search_in_turn<LEVELS>(keys, filter, then_top_p, b.low, b.high, s, sh);
}
