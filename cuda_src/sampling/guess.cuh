// Where a filter's boundary lies in a row, guessed from an eighth of it. A guess decides how much work is done, never what is drawn.
//
// A row of probabilities sums to one, so top_p's boundary is where the values below it weigh 1 - top_p: many small values, of which a part tells
// much, while the mass above the boundary may be one token's. top_k's boundary is a rank. Both come with a margin of 4.5 standard deviations.
#pragma once

#include "sampling/select.cuh"

constexpr int PART = 8;  // one group of 32 vectors in so many is looked at
constexpr float DEVIATIONS = 4.5f;
constexpr float LEAST_MARGIN = 32.f;  // in elements of the part: there, few of those that matter may have been seen

// Bins of keys: 256 an octave from 2^-23 to 2, where the probabilities that matter lie, 8 an octave below and above.
constexpr int GUESS_BINS = 8192;
constexpr uint32_t FINE_FROM = 104u << 23, FINE_TO = 128u << 23;
constexpr uint32_t FINE_BIN = 104u * 8, COARSE_BIN = FINE_BIN + 24u * 256;  // the first bin that is fine, the first that no longer is

PYINFER_DEVICE uint32_t guess_bin(uint32_t key) {
    return key < FINE_FROM ? key >> 20 : key < FINE_TO ? ((key - FINE_FROM) >> 15) + FINE_BIN : ((key - FINE_TO) >> 20) + COARSE_BIN;
}
PYINFER_DEVICE uint32_t first_key_of_bin(uint32_t bin) {
    return bin < FINE_BIN ? bin << 20 : bin < COARSE_BIN ? ((bin - FINE_BIN) << 15) + FINE_FROM : ((bin - COARSE_BIN) << 20) + FINE_TO;
}
static_assert(COARSE_BIN + 127u * 8 <= GUESS_BINS, "a bin for every finite float");

constexpr int OWN_GUESS_BINS = GUESS_BINS / BLOCK;
// Where a bin lies: a thread's bins are a column, and bins next to each other are in different banks.
PYINFER_DEVICE uint32_t guess_slot(uint32_t bin) {
    const uint32_t row = bin % OWN_GUESS_BINS;
    return row * BLOCK + (bin / OWN_GUESS_BINS + 3 * row) % BLOCK;
}

struct GuessShared {
    float first_rank, last_rank;  // of top_p's boundary, counted in the part from its largest value on
    uint32_t low, high;
    BlockScratch scratch;
};

// The share of the row's vectors that walk_part sees. Every warp computes all of it.
template <typename T>
PYINFER_DEVICE float seen_share(const Row<T>& row) {
    const int length = lane_id() < WARPS ? row.run_begin(lane_id() + 1) - row.run_begin(lane_id()) : 0;
    const int seen = length / (32 * PART) * 32 + min_of(length % (32 * PART), 32);
    return static_cast<float>(__reduce_add_sync(ALL_LANES, seen)) / static_cast<float>(row.num_vecs);
}

// Keys between which the boundary is likely to lie. bins: GUESS_BINS words of shared memory. All threads call it.
template <typename T, typename Source>
PYINFER_DEVICE Range guess(const RowKeys<T, Source>& keys, const Filter& filter, uint32_t* bins, GuessShared& sh) {
#pragma unroll
    for (int i = 0; i < OWN_GUESS_BINS; i++) {
        bins[threadIdx.x + i * BLOCK] = 0u;
    }
    if (threadIdx.x == 0) {
        sh.first_rank = sh.last_rank = 0.f;  // where no bin lies on top_p's boundary, the part has missed the tokens that weigh most
        sh.low = LOWEST_KEY;
        sh.high = HIGHEST_KEY;
    }
    __syncthreads();
    const Row<T>& row = keys.row;
    row.template walk<Source::DEPTH>(row.run_begin(warp_id()), row.run_begin(warp_id() + 1), lane_id(), 32 * PART, Source::fill(), [&](T x, int) {
        const uint32_t key = keys.source.key(x);
        if (key - 1u < INF_BITS - 1u) {
            atomicAdd(&bins[guess_slot(guess_bin(key))], 1u);
        }
    });
    __syncthreads();

    // Thread t looks at the bins from `lowest_bin` on, the higher the smaller t: sums over the threads before it are sums over higher bins. Masses are in
    // units of 2^-44 of a bin's first value: nobody minds how they are rounded, but a sum must be the same in all threads.
    const int lowest_bin = GUESS_BINS - OWN_GUESS_BINS * (static_cast<int>(threadIdx.x) + 1);
    const auto count_in = [&](int bin) { return bins[guess_slot(bin)]; };
    const auto first_value = [](int bin) { return __uint_as_float(min_of(first_key_of_bin(bin), FINE_TO)); };
    uint32_t own_count = 0;
    float own_sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN_GUESS_BINS; i++) {
        const uint32_t count = count_in(lowest_bin + i);
        own_count += count;
        own_sum += static_cast<float>(count) * first_value(lowest_bin + i);
    }
    const float one = power_of_two(SCALE_BITS);
    const uint64_t own_mass = static_cast<uint64_t>(own_sum * one);
    uint64_t all_counts, all_masses;
    const uint32_t count_above = static_cast<uint32_t>(block_exclusive_scan(own_count, sh.scratch, all_counts));
    const uint64_t mass_above = block_exclusive_scan(own_mass, sh.scratch, all_masses);
    const float share = seen_share(row);
    if (filter.limit != UNLIMITED) {
        const uint64_t tail = filter.limit < 1ull << SCALE_BITS ? static_cast<uint64_t>(share * (one - static_cast<float>(filter.limit))) : 0;
        if (all_masses - mass_above > tail && all_masses - (mass_above + own_mass) <= tail) {  // one thread, if any
            const float to_go = static_cast<float>(all_masses - mass_above - tail) / one;
            float sum = 0.f;
            uint32_t before = count_above;
#pragma unroll 1
            for (int bin = lowest_bin + OWN_GUESS_BINS - 1; bin >= lowest_bin; bin--) {
                const uint32_t count = count_in(bin);
                const float value = first_value(bin);
                sum += static_cast<float>(count) * value;
                if (sum >= to_go || bin == lowest_bin) {
                    // The tail's values are no larger than the bin's, so its variance is at most its mass times such a value.
                    const float margin = LEAST_MARGIN + DEVIATIONS * __fsqrt_rn(static_cast<float>(tail) / one / value);
                    sh.first_rank = static_cast<float>(before) - margin;
                    sh.last_rank = static_cast<float>(before + count) + margin;
                    break;
                }
                before += count;
            }
        }
        __syncthreads();
    }
    const float lowest_rank = static_cast<float>(all_counts);
    float first_rank = filter.limit != UNLIMITED ? sh.first_rank : lowest_rank;
    float last_rank = filter.limit != UNLIMITED ? max_of(sh.last_rank, LEAST_MARGIN) : lowest_rank;
    if (filter.k != UNLIMITED) {
        const float rank = share * static_cast<float>(filter.k), margin = LEAST_MARGIN + DEVIATIONS * __fsqrt_rn(rank);
        first_rank = min_of(first_rank, rank - margin);
        last_rank = min_of(last_rank, rank + margin);
    }
    first_rank = min_of(first_rank, lowest_rank - 1.f);
    const auto find = [&](float rank, auto&& found) {  // found(bin) by the thread that has it
        if (static_cast<float>(count_above) <= rank && rank < static_cast<float>(count_above + own_count)) {
            int bin = lowest_bin + OWN_GUESS_BINS - 1;
            uint32_t up_to = count_above + count_in(bin);
#pragma unroll 1
            while (rank >= static_cast<float>(up_to)) {
                up_to += count_in(--bin);
            }
            found(bin);
        }
    };
    if (first_rank > 0.f) {  // else all that is above may matter
        find(first_rank, [&](int bin) { sh.high = first_key_of_bin(bin + 1) - 1u; });
    }
    find(last_rank, [&](int bin) { sh.low = max_of(first_key_of_bin(bin), LOWEST_KEY); });
    __syncthreads();
    return Range{sh.low, sh.high};
}
