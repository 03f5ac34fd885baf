// A row's keys held in the shared memory of a cluster of blocks, and the search for a filter's boundary there. What is read from device memory is read
// once.
//
// The row is cut into C * WARPS runs of vectors, one a warp, so that ids ascend over the warps of the cluster. A warp alone writes and walks its run.
// Sums and histograms are made in every block and added up by whoever needs them, out of the other blocks' shared memory: all blocks get the same
// integers and take the same turns. Buffers that others read come in pairs, used in turns: when a block writes one again, a barrier lies behind it that
// the others passed after they had read it.
#pragma once

#include "common/ptx_cluster.cuh"
#include "sampling/block.cuh"
#include "sampling/mass.cuh"

constexpr int BINS = BLOCK;  // one a thread
constexpr int BIN_BITS = 9;
constexpr int FIRST_SHIFT = 20;  // eight bins an octave; all below 64 octaves under the largest value share the last
static_assert(BINS == 1 << BIN_BITS, "a bin for every thread");

struct ClusterShared {
    uint64_t of_warp[2][WARPS], loaded_mass[WARPS];  // read by the cluster
    uint32_t count[2][BINS], mass_low[2][BINS], mass_high[2][BINS];  // read by the cluster; sums of the low and high 12 bits of Mass::digits
    uint64_t scan[3][WARPS];
    uint32_t digit, sure_digit;  // results of a scan over the bins
    uint64_t count_above, mass_above, count_in, mass_in;
};

template <int C>
struct ClusterRow {
    static constexpr int SLOTS = C * WARPS;
    static constexpr int PER_LANE = SLOTS / 32;
    static_assert(SLOTS % 32 == 0, "a lane looks at a whole number of warps");

    ClusterShared& sh;
    uint4* keys;  // of this warp's run, four to a word of 16 bytes; 0: cannot be drawn
    int words;  // a lane's share of the run: word i of lane l is keys[i * 32 + l]
    uint32_t rank;
    int turn = 0, bins_turn = 0;

    PYINFER_DEVICE int slot() const { return static_cast<int>(rank) * WARPS + warp_id(); }

    template <typename F>
    PYINFER_DEVICE void walk(F&& f) const {
#pragma unroll 2
        for (int i = 0; i < words; i++) {
            const uint4 k = keys[i * 32 + lane_id()];
            f(k.x), f(k.y), f(k.z), f(k.w);
        }
    }
    // f(key) replaces the key.
    template <typename F>
    PYINFER_DEVICE void transform(F&& f) {
#pragma unroll 2
        for (int i = 0; i < words; i++) {
            uint4 k = keys[i * 32 + lane_id()];
            k.x = f(k.x), k.y = f(k.y), k.z = f(k.z), k.w = f(k.w);
            keys[i * 32 + lane_id()] = k;
        }
    }

    // Every warp gives a value (its lane 0 does); lane l gets those of slots l * PER_LANE and on. All threads of the cluster call it.
    PYINFER_DEVICE void exchange(uint64_t of_warp, uint64_t (&all)[PER_LANE]) {
        if (lane_id() == 0) {
            sh.of_warp[turn][warp_id()] = of_warp;
        }
        __syncwarp();
        cluster_sync();
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int from = lane_id() * PER_LANE + i;
            all[i] = load_cluster_u64(cluster_address(&sh.of_warp[turn][from % WARPS], from / WARPS));
        }
        turn ^= 1;
    }
    PYINFER_DEVICE uint64_t total(uint64_t own) {
        uint64_t all[PER_LANE], sum = 0;
        exchange(warp_sum(own), all);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            sum += all[i];
        }
        return warp_sum(sum);
    }
    PYINFER_DEVICE uint32_t largest(uint32_t own) {
        uint64_t all[PER_LANE];
        exchange(__reduce_max_sync(ALL_LANES, own), all);
        uint32_t x = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            x = max_of(x, static_cast<uint32_t>(all[i]));
        }
        return __reduce_max_sync(ALL_LANES, x);
    }

    // This thread's share of the mass of keys >= lowest.
    PYINFER_DEVICE uint64_t own_mass(uint32_t lowest, int s) const {
        MassSum own(s);
#pragma unroll 1
        for (int i = 0; i < words; i++) {
            const uint4 k = keys[i * 32 + lane_id()];
            own.add(k.x >= lowest ? k.x : 0u), own.add(k.y >= lowest ? k.y : 0u), own.add(k.z >= lowest ? k.z : 0u), own.add(k.w >= lowest ? k.w : 0u);
            own.close();
        }
        return own.units;
    }

    // The row's elements in a bin: this thread's, BINS - 1 - threadIdx.x, so that a scan over the threads sums higher bins.
    struct Bin {
        uint64_t count, mass;
    };
    // Of keys in [low, high]; bin 0 holds all below base + 2^shift. With a mass, a bin must lie in one octave. All threads of the cluster call it.
    PYINFER_DEVICE Bin histogram(uint32_t low, uint32_t high, uint32_t base, int shift, bool with_mass, int s) {
        uint32_t *const count = sh.count[bins_turn], *const mass_low = sh.mass_low[bins_turn], *const mass_high = sh.mass_high[bins_turn];
        count[threadIdx.x] = 0u;
        mass_low[threadIdx.x] = 0u;
        mass_high[threadIdx.x] = 0u;
        __syncthreads();
        walk([&](uint32_t key) {
            if (key >= low && key <= high) {
                const uint32_t digit = (max_of(key, base) - base) >> shift;
                atomicAdd(&count[digit], 1u);
                if (with_mass) {
                    const uint32_t digits = mass_of(key, s).digits;
                    atomicAdd(&mass_low[digit], digits & 0xfffu);
                    atomicAdd(&mass_high[digit], digits >> 12);
                }
            }
        });
        __syncwarp();
        cluster_sync();
        const uint32_t own = BINS - 1 - threadIdx.x;
        uint32_t counts = 0, lows = 0, highs = 0;  // below 2^30: at most 2^18 elements
#pragma unroll
        for (int i = 0; i < C; i++) {
            const uint32_t peer = (rank + i) % C;  // not all of the one block at once
            counts += load_cluster_u32(cluster_address(&count[own], peer));
            if (with_mass) {
                lows += load_cluster_u32(cluster_address(&mass_low[own], peer));
                highs += load_cluster_u32(cluster_address(&mass_high[own], peer));
            }
        }
        bins_turn ^= 1;
        const uint64_t digits = (static_cast<uint64_t>(highs) << 12) + lows;
        // 63: an empty bin above the row's largest value
        return Bin{counts, digits << min_of(mass_shift(base + (own << shift), s), 63)};
    }

    // x[i] becomes the sum over the threads before this one, all[i] that over the block. All threads of the block call it, and pass a barrier before the
    // next call.
    template <int N>
    PYINFER_DEVICE void scan(uint64_t (&x)[N], uint64_t (&all)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint64_t inclusive = warp_inclusive_scan(x[i]);
            if (lane_id() == 31) {
                sh.scan[i][warp_id()] = inclusive;
            }
            x[i] = inclusive - x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint64_t of_warp = lane_id() < WARPS ? sh.scan[i][lane_id()] : 0;
            const uint64_t inclusive = warp_inclusive_scan(of_warp);
            x[i] += __shfl_sync(ALL_LANES, inclusive - of_warp, warp_id());
            all[i] = __shfl_sync(ALL_LANES, inclusive, 31);
        }
    }

    // The smallest key that `filter` keeps among those >= lowest, of which there is one. `top`: the largest key. All threads of the cluster call it.
    //
    // Radix selection. A first histogram of counts alone, over all of the row (one shared-memory increment an element), bounds the masses from both
    // sides; that leaves a short range of keys, whose bins are then refined with exact masses.
    PYINFER_DEVICE uint32_t search(const Filter& filter, uint32_t lowest, uint32_t top, int s) {
        const bool with_mass = filter.limit != UNLIMITED;
        const uint32_t top_digit = top >> FIRST_SHIFT;
        uint32_t base = (top_digit >= BINS ? top_digit - (BINS - 1) : 0u) << FIRST_SHIFT;
        {
            const uint64_t count = histogram(lowest, top, base, FIRST_SHIFT, false, s).count;
            const uint32_t bin = BINS - 1 - threadIdx.x;
            const uint32_t lower = bin == 0 ? lowest : max_of(base + (bin << FIRST_SHIFT), lowest);
            const uint32_t upper = base + (bin << FIRST_SHIFT) + ((1u << FIRST_SHIFT) - 1u);
            const uint64_t least = count ? count * mass_of(lower, s).units() : 0;
            const uint64_t most = count ? count * mass_of(upper, s).units() : 0;
            uint64_t above[3] = {count, least, most}, all[3];
            scan(above, all);
            const bool last = above[0] + count == all[0];
            if (count > 0 && filter.accepts(above[0], above[1]) && (last || !filter.accepts(above[0] + count, above[1] + least))) {
                sh.digit = bin;  // the lowest bin that may hold kept values
            }
            if (count > 0 && filter.accepts(above[0], above[2]) && (last || !filter.accepts(above[0] + count, above[2] + most))) {
                sh.sure_digit = bin;  // the lowest bin that is certain to
                sh.count_above = above[0];
            }
            __syncthreads();
        }
        uint32_t low = sh.digit == 0 ? lowest : max_of(base + (sh.digit << FIRST_SHIFT), lowest);
        uint32_t high = min_of(base + (sh.sure_digit << FIRST_SHIFT) + ((1u << FIRST_SHIFT) - 1u), top);
        uint64_t count_above = sh.count_above, mass_above = 0;
        if (with_mass && high < top) {
            mass_above = total(own_mass(high + 1u, s));
        }
#pragma unroll 1
        for (;;) {
            int shift = max_of(32 - __clz(static_cast<int>(high - low)) - BIN_BITS, 0);
            shift += (high >> shift) - (low >> shift) >= BINS;
            base = low >> shift << shift;
            const Bin bin = histogram(low, high, base, shift, with_mass, s);
            const uint32_t digit = BINS - 1 - threadIdx.x;
            uint64_t above[2] = {bin.count, bin.mass}, all[2];
            scan(above, all);
            above[0] += count_above;
            above[1] += mass_above;
            const uint64_t count_in = above[0] + bin.count, mass_in = above[1] + bin.mass;
            // The lowest bin kept is the one after which nothing is, or nothing is left: exactly one thread finds it.
            if (bin.count > 0 && filter.accepts(above[0], above[1]) && (!filter.accepts(count_in, mass_in) || count_in == all[0] + count_above)) {
                sh.digit = digit;
                sh.count_above = above[0];
                sh.mass_above = above[1];
                sh.count_in = count_in;
                sh.mass_in = mass_in;
            }
            __syncthreads();
            base += sh.digit << shift;
            low = max_of(low, base);
            high = min_of(high, base + ((1u << shift) - 1u));
            count_above = sh.count_above;
            mass_above = sh.mass_above;
            // No further look where the bin holds one element or is kept as a whole: the elements above its smallest value are fewer than count_in and
            // weigh less than mass_in.
            if (shift == 0 || sh.count_in - count_above == 1 || (sh.count_in <= filter.k && sh.mass_in <= filter.limit)) {
                return low;
            }
        }
    }
};
