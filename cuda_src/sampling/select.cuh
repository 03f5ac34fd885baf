// The value of a row from which on a filter keeps tokens, found exactly and without sorting.
//
// A filter accepts value x iff count(> x) < k and mass(> x) < limit. Acceptance is monotone in x, so there is one smallest kept value, the boundary.
//
// 1. A part of the row tells about where the boundary is: a range of keys, a few thousand tokens wide (guess.cuh).
// 2. One walk over the row counts and weighs what is above the range and copies what is in it to shared memory: the candidates.
// 3. A radix selection among the candidates finds the boundary; what they and the sums of step 2 say is exact, however good the guess was. If they show
//    that the boundary is not among them, or if they are too many, the radix selection runs on the row itself.
//
// Counts and masses are integers: the result depends neither on the order of the atomics nor on how the work is split, nor on the guess.
#pragma once

#include "sampling/row.cuh"

constexpr int DIGIT_BITS = 11;
constexpr int DIGITS = 1 << DIGIT_BITS;  // bins of a histogram
constexpr int OWN_DIGITS = DIGITS / BLOCK;
constexpr uint32_t HIGHEST_KEY = 0xffffffffu;

// What a search writes for all threads to read.
struct SearchShared {
    uint32_t count[DIGITS];
    uint32_t mass_low[DIGITS];  // sums of the low and high 12 bits of Mass::digits: with up to 2^18 elements neither overflows
    uint32_t mass_high[DIGITS];
    uint32_t digit;
    uint32_t count_above, count_in;
    uint64_t mass_above, mass_in;
    BlockScratch scratch;
};

// Keys low..high, and what is known of the keys above high.
struct Range {
    uint32_t low, high;
    uint32_t count_above = 0;
    uint64_t mass_above = 0;
};

struct Selection {
    uint32_t lowest;  // accepted are the keys >= lowest
    uint32_t count;  // of the accepted elements
    uint64_t mass;
};

// A row's elements as keys.
template <typename T, typename Source>
struct RowKeys {
    const Row<T>& row;
    const Source& source;

    // Uniform in a warp, by whole vectors.
    template <typename F>
    PYINFER_DEVICE void walk_vectors(F&& f) const {
        row.template walk<Source::DEPTH>(0, row.num_vecs, threadIdx.x, BLOCK, Source::fill(), [&](T x, int) { f(source.key(x)); });
    }
    // The same by runs of warps; after() follows every few elements.
    template <typename F, typename After>
    PYINFER_DEVICE void walk_run(F&& f, After&& after) const {
        row.template walk<Source::DEPTH>(
            row.run_begin(warp_id()), row.run_begin(warp_id() + 1), lane_id(), 32, Source::fill(), [&](T x, int) { f(source.key(x)); }, after);
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

    // This thread's share of the mass of keys >= lowest in its warp's run.
    PYINFER_DEVICE uint64_t own_mass(uint32_t lowest, int s) const {
        MassSum sum(s);
        walk_run(
            [&](uint32_t key) {
                if (key >= lowest) {
                    sum.add(key);
                }
            },
            [&] { sum.close(); });
        return sum.units;
    }
};

PYINFER_DEVICE void clear_bins(uint32_t* bins) {
#pragma unroll
    for (int i = 0; i < OWN_DIGITS; i++) {
        bins[threadIdx.x + i * BLOCK] = 0u;
    }
}

// The boundary among the keys in `range`, of which there is one, and which are all that may be accepted beside those above. Radix selection from the top
// digit: a histogram of the next 11 bits that differ, then on into the lowest bin that is not empty and whose largest value is accepted. A bin with a
// mass must lie in one octave: ranges of 31 bits have it so. All threads call it.
template <bool WITH_MASS, typename Keys>
PYINFER_DEVICE Selection search(const Keys& keys, const Filter& filter, Range range, int s, SearchShared& sh) {
#pragma unroll 1
    for (;;) {
        int shift = max_of(32 - __clz(static_cast<int>(range.high - range.low)) - DIGIT_BITS, 0);
        shift += (range.high >> shift) - (range.low >> shift) >= DIGITS;
        const uint32_t base = range.low >> shift << shift;
        clear_bins(sh.count);
        if constexpr (WITH_MASS) {
            clear_bins(sh.mass_low);
            clear_bins(sh.mass_high);
        }
        __syncthreads();
        keys.walk([&](uint32_t key) {
            if (key >= range.low && key <= range.high) {
                const uint32_t digit = (key - base) >> shift;
                atomicAdd(&sh.count[digit], 1u);
                if constexpr (WITH_MASS) {
                    const uint32_t digits = mass_of(key, s).digits;
                    atomicAdd(&sh.mass_low[digit], digits & 0xfffu);
                    atomicAdd(&sh.mass_high[digit], digits >> 12);
                }
            }
        });
        __syncthreads();  // the histogram is complete

        // Thread t looks at bins from DIGITS - 1 - t * OWN_DIGITS downwards: an exclusive scan over the threads is a sum over higher bins.
        const int first = DIGITS - 1 - OWN_DIGITS * static_cast<int>(threadIdx.x);
        const auto mass_of_bin = [&](uint32_t digit) -> uint64_t {
            if constexpr (WITH_MASS) {
                const uint64_t digits = (static_cast<uint64_t>(sh.mass_high[digit]) << 12) + sh.mass_low[digit];
                // 63: an empty bin above the row's largest value
                return digits << min_of(mass_shift(base + (digit << shift), s), 63);
            }
            return 0;
        };
        uint32_t own_count = 0;
        uint64_t own_mass = 0;
#pragma unroll
        for (int i = 0; i < OWN_DIGITS; i++) {
            own_count += sh.count[first - i];
            own_mass += mass_of_bin(first - i);
        }
        uint64_t all_counts, all_masses;
        uint32_t above = range.count_above + static_cast<uint32_t>(block_exclusive_scan(own_count, sh.scratch, all_counts));
        uint64_t above_mass = range.mass_above;
        if constexpr (WITH_MASS) {
            above_mass += block_exclusive_scan(own_mass, sh.scratch, all_masses);
        }
        all_counts += range.count_above;
        // The lowest accepted bin is the one after which nothing is accepted, or nothing is left: one thread has it.
        const auto is_last = [&](uint32_t count_in, uint64_t mass_in) { return !filter.accepts(count_in, mass_in) || count_in == all_counts; };
        if (own_count > 0 && filter.accepts(above, above_mass) && is_last(above + own_count, above_mass + own_mass)) {
#pragma unroll 1
            for (int digit = first;; digit--) {
                const uint32_t count = sh.count[digit];
                const uint64_t mass = mass_of_bin(digit);
                if (count > 0 && is_last(above + count, above_mass + mass)) {
                    sh.digit = digit;
                    sh.count_above = above;
                    sh.mass_above = above_mass;
                    sh.count_in = above + count;
                    sh.mass_in = above_mass + mass;
                    break;
                }
                above += count;
                above_mass += mass;
            }
        }
        __syncthreads();
        const uint32_t count_in = sh.count_in;
        const uint64_t mass_in = sh.mass_in;
        const uint32_t bin = base + (sh.digit << shift);
        range = Range{max_of(range.low, bin), min_of(range.high, bin + ((1u << shift) - 1u)), sh.count_above, sh.mass_above};
        __syncthreads();  // the next round, or search, may write the results again
        // No further look where the bin holds one element or is accepted as a whole: the elements above its smallest value are fewer than count_in
        // and weigh less than mass_in.
        if (shift == 0 || count_in - range.count_above == 1 || (count_in <= filter.k && mass_in <= filter.limit)) {
            return Selection{range.low, count_in, mass_in};
        }
    }
}
