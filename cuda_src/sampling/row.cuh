// A row of a [rows, vocab] matrix of any row stride, read 16 bytes at a time whatever its alignment, and what its elements mean: probabilities or logits.
//
// Vectors are counted from the last 16-byte boundary at or before the row, so every vector load is aligned; the first and the last vector may reach
// beyond the row, and are then read element by element. Walks are uniform in a warp (the callbacks may use warp votes): lanes beyond the row see `fill`.
#pragma once

#include "sampling/block.cuh"
#include "sampling/mass.cuh"

template <typename T>
struct Row {
    static constexpr int VEC = 16 / sizeof(T);
    static constexpr int IN_FLIGHT = 16 / VEC;  // vectors a thread loads before it uses the first: 32 KB a block and more cover the latency
    using Vec = vec_t<T, VEC>;

    const T* base;  // the 16-byte boundary; elements [begin, end) from there are the row
    int begin, end;
    int num_vecs;

    PYINFER_DEVICE Row(const T* row, int vocab) {
        begin = static_cast<int>((reinterpret_cast<uint64_t>(row) & 15u) / sizeof(T));
        base = row - begin;
        end = begin + vocab;
        num_vecs = ceil_div(end, VEC);
    }

    PYINFER_DEVICE Vec load(int j, T fill) const {
        const int first = j * VEC;
        if (first >= begin && first + VEC <= end) {
            return Vec::load(base + first);
        }
        Vec v;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            v[e] = first + e >= begin && first + e < end ? base[first + e] : fill;
        }
        return v;
    }

    // f(x, id) for every element of vectors [from, to) that `lanes` threads share, this one being the `lane`th; id is outside [0, vocab) for a fill.
    // DEPTH vectors are loaded at a time; the code of f is there DEPTH * VEC times, so a long f takes a small DEPTH. after() follows each DEPTH vectors.
    template <int DEPTH = IN_FLIGHT, typename F, typename After>
    PYINFER_DEVICE void walk(int from, int to, int lane, int lanes, T fill, F&& f, After&& after) const {
        const int first_whole = begin > 0 ? 1 : 0, whole_end = min_of(to, end / VEC);
        // lane & ~31: all lanes of a warp run the same number of rounds
        for (int j0 = from + (lane & ~31); j0 < to; j0 += lanes * DEPTH) {
            Vec v[DEPTH];
            if (j0 >= first_whole && j0 + lanes * (DEPTH - 1) + 32 <= whole_end) {
#pragma unroll
                for (int u = 0; u < DEPTH; u++) {
                    v[u] = Vec::load(base + (j0 + u * lanes + lane_id()) * VEC);
                }
            } else {
#pragma unroll
                for (int u = 0; u < DEPTH; u++) {
                    const int j = j0 + u * lanes + lane_id();
                    v[u] = load(j < to ? j : num_vecs, fill);
                }
            }
#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                const int j = j0 + u * lanes + lane_id();
                if (j0 + u * lanes >= to) {  // uniform in the warp
                    break;
                }
#pragma unroll
                for (int e = 0; e < VEC; e++) {
                    f(v[u][e], (j < to ? j : num_vecs) * VEC + e - begin);
                }
            }
            after();
        }
    }
    template <int DEPTH = IN_FLIGHT, typename F>
    PYINFER_DEVICE void walk(int from, int to, int lane, int lanes, T fill, F&& f) const {
        walk<DEPTH>(from, to, lane, lanes, fill, f, [] {});
    }

    // Each warp owns one run of vectors, so that ids ascend over the warps.
    PYINFER_DEVICE int run() const { return ceil_div(num_vecs, WARPS); }
    PYINFER_DEVICE int run_begin(int warp) const { return min_of(warp * run(), num_vecs); }
};

// ---- what an element means: key(x) orders probabilities, 0 for a token that can't be drawn ------------------------------------------
template <typename T>
struct Probs {
    static constexpr int DEPTH = Row<T>::IN_FLIGHT;  // of walks that ask for keys

    PYINFER_DEVICE static T fill() { return T{}; }
    // Also for elements not yet known to be valid: NaN, infinity and negative values give keys from INF_BITS on. -0 becomes +0.
    PYINFER_DEVICE static uint32_t key(T x) { return __float_as_uint(__fadd_rn(to_float(x), 0.f)); }
};

// Keys of float logits: ascending with the value, 0 for NaN (below -infinity's).
PYINFER_DEVICE uint32_t logit_key(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.f));
    const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return x == x ? key : 0u;
}
PYINFER_DEVICE float logit_of_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
constexpr uint32_t MINUS_INF_KEY = 0x007fffffu;

template <typename T>
struct Logits {
    static constexpr int DEPTH = 8 / Row<T>::VEC;  // eight exp in a row fill the pipelines, and 16 or more take longer to compile than to run

    float top;  // the largest logit
    float inverse_temperature;
    float inverse_sum;

    PYINFER_DEVICE static T fill() { return from_float<T>(-infinity()); }
    // exp((x - top) / temperature); x == top first, for top may be infinite.
    PYINFER_DEVICE float weight(T x) const {
        const float v = to_float(x);
        const float w = exp_nonpositive(__fmul_rn(__fadd_rn(v, -top), inverse_temperature));
        return v == top ? 1.f : w;
    }
    PYINFER_DEVICE float prob(T x) const { return __fmul_rn(weight(x), inverse_sum); }
    PYINFER_DEVICE uint32_t key(T x) const { return __float_as_uint(prob(x)); }
};

struct LogitsState {
    bool has_nan;
    bool valid;  // no NaN, and not all -infinity
};

// Reads the row twice (largest logit, sum of weights) and fills in `logits`. All threads call it.
template <typename T>
PYINFER_DEVICE LogitsState prepare_logits(const Row<T>& row, float inverse_temperature, Logits<T>& logits, BlockScratch& scratch) {
    uint32_t top = 0u;
    bool has_nan = false;
    row.walk(0, row.num_vecs, threadIdx.x, BLOCK, Logits<T>::fill(), [&](T x, int) {
        const uint32_t key = logit_key(to_float(x));
        top = max_of(top, key);
        has_nan |= key == 0u;
    });
    top = block_max(top, scratch);
    has_nan = __syncthreads_or(has_nan);
    logits.top = logit_of_key(max_of(top, MINUS_INF_KEY));
    logits.inverse_temperature = inverse_temperature;
    const LogitsState state{has_nan, !has_nan && top > MINUS_INF_KEY};
    if (!state.valid) {
        return state;
    }
    MassSum weights(SCALE_BITS);
    row.template walk<Logits<T>::DEPTH>(
        0, row.num_vecs, threadIdx.x, BLOCK, Logits<T>::fill(), [&](T x, int) { weights.add(__float_as_uint(logits.weight(x))); }, [&] { weights.close(); });
    const uint64_t sum = block_sum(weights.units, scratch);
    logits.inverse_sum = __frcp_rn(mass_to_float(sum, SCALE_BITS));
    return state;
}
