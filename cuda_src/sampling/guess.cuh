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
    constexpr int OWN = GUESS_BINS / BLOCK;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
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
            atomicAdd(&bins[guess_bin(key)], 1u);
        }
    });
    __syncthreads();

    // Thread t looks at OWN bins, the highest of them GUESS_BINS - 1 - t * OWN: sums over the threads before it are sums over higher bins.
    const int lowest_bin = GUESS_BINS - OWN * (static_cast<int>(threadIdx.x) + 1);
    const auto mass_of_bin = [](int bin) { return mass_of(min_of(first_key_of_bin(bin), FINE_TO - 1u), SCALE_BITS).units(); };
    uint32_t own_count = 0;
    uint64_t own_mass = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const uint32_t count = bins[lowest_bin + i];
        own_count += count;
        own_mass += count * mass_of_bin(lowest_bin + i);
    }
    uint64_t all_counts, all_masses;
    const uint32_t count_above = static_cast<uint32_t>(block_exclusive_scan(own_count, sh.scratch, all_counts));
    uint64_t above = block_exclusive_scan(own_mass, sh.scratch, all_masses);
    const float share = seen_share(row);
    if (filter.limit != UNLIMITED) {
        const uint64_t one = 1ull << SCALE_BITS;
        const uint64_t tail = filter.limit < one ? static_cast<uint64_t>(share * static_cast<float>(one - filter.limit)) : 0;
        uint32_t count_before = count_above;
#pragma unroll 1
        for (int i = OWN - 1; i >= 0; i--) {
            const uint32_t count = bins[lowest_bin + i];
            const uint64_t each = mass_of_bin(lowest_bin + i), in = above + count * each;
            if (count > 0 && all_masses - above > tail && all_masses - in <= tail) {  // one thread, if any
                // The tail's values are no larger than the bin's, so its variance is at most its mass times such a value.
                const float margin = LEAST_MARGIN + DEVIATIONS * __fsqrt_rn(static_cast<float>(tail) / static_cast<float>(each));
                sh.first_rank = static_cast<float>(count_before) - margin;
                sh.last_rank = static_cast<float>(count_before + count) + margin;
            }
            count_before += count;
            above = in;
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
    uint32_t before = count_above;
#pragma unroll 1
    for (int i = OWN - 1; i >= 0; i--) {
        const int bin = lowest_bin + i;
        const float from = static_cast<float>(before), to = static_cast<float>(before + bins[bin]);
        if (first_rank > 0.f && from <= first_rank && first_rank < to) {  // from rank 0 on, all that is above may matter
            sh.high = first_key_of_bin(bin + 1) - 1u;
        }
        if (from <= last_rank && last_rank < to) {
            sh.low = max_of(first_key_of_bin(bin), LOWEST_KEY);
        }
        before += bins[bin];
    }
    __syncthreads();
    return Range{sh.low, sh.high};
}
