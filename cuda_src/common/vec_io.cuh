// Raw vectors: N elements of T held as the 16 bytes (or fewer) they were loaded as, and converted to float only where they are used. A row kept this way
// costs half the registers of one kept in float. T may be f16, bf16, float, e4m3 or e5m2 (saturating); for moving bytes also uint8_t.
#pragma once
#include "common/fp8_pack.cuh"
#include "common/types.cuh"

template <int BYTES>
struct raw_words {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "a vector is 1, 2, 4, 8 or 16 bytes");
    uint32_t w[BYTES / 4];
};
template <>
struct raw_words<2> {
    uint16_t w[1];
};
template <>
struct raw_words<1> {
    uint8_t w[1];
};

template <typename T, int N>
struct raw_vec : raw_words<static_cast<int>(sizeof(T)) * N> {
    static constexpr int BYTES = static_cast<int>(sizeof(T)) * N;

    // Zero is all bits zero in every type.
    PYINFER_DEVICE static raw_vec zero() {
        raw_vec v;
#pragma unroll
        for (auto& word : v.w) {
            word = 0;
        }
        return v;
    }

    // Through the caches as usual: for what other blocks read as well. `p` must be aligned to BYTES.
    PYINFER_DEVICE static raw_vec load(const T* p) {
        raw_vec v;
        if constexpr (BYTES == 16) {
            const uint4 q = *reinterpret_cast<const uint4*>(p);
            v.w[0] = q.x, v.w[1] = q.y, v.w[2] = q.z, v.w[3] = q.w;
        } else if constexpr (BYTES == 8) {
            const uint2 q = *reinterpret_cast<const uint2*>(p);
            v.w[0] = q.x, v.w[1] = q.y;
        } else if constexpr (BYTES == 4) {
            v.w[0] = *reinterpret_cast<const uint32_t*>(p);
        } else if constexpr (BYTES == 2) {
            v.w[0] = *reinterpret_cast<const uint16_t*>(p);
        } else {
            v.w[0] = *reinterpret_cast<const uint8_t*>(p);
        }
        return v;
    }

    // Past L1: for what is read once, so that it does not push the shared operands (weights) out. Not the read-only path: operators work in place too.
    PYINFER_DEVICE static raw_vec load_once(const T* p) {
        if constexpr (BYTES == 16) {
            raw_vec v;
            asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
            return v;
        } else if constexpr (BYTES == 8) {
            raw_vec v;
            asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p));
            return v;
        } else {
            return load(p);
        }
    }

    // First out of L2, too ("evict first"): for what nobody reads again soon.
    PYINFER_DEVICE static raw_vec load_stream(const T* p) {
        if constexpr (BYTES == 16) {
            raw_vec v;
            asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
            return v;
        } else {
            return load_once(p);
        }
    }

    // Written and not read again soon: first out of L2.
    PYINFER_DEVICE void store_stream(T* p) const {
        if constexpr (BYTES == 16) {
            asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(this->w[0]), "r"(this->w[1]), "r"(this->w[2]), "r"(this->w[3]) : "memory");
        } else if constexpr (BYTES == 8) {
            asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(this->w[0]), "r"(this->w[1]) : "memory");
        } else {
            store(p);
        }
    }

    PYINFER_DEVICE void store(T* p) const {
        if constexpr (BYTES == 16) {
            *reinterpret_cast<uint4*>(p) = make_uint4(this->w[0], this->w[1], this->w[2], this->w[3]);
        } else if constexpr (BYTES == 8) {
            *reinterpret_cast<uint2*>(p) = make_uint2(this->w[0], this->w[1]);
        } else if constexpr (BYTES == 4) {
            *reinterpret_cast<uint32_t*>(p) = this->w[0];
        } else if constexpr (BYTES == 2) {
            *reinterpret_cast<uint16_t*>(p) = this->w[0];
        } else {
            *reinterpret_cast<uint8_t*>(p) = this->w[0];
        }
    }

    PYINFER_DEVICE void to_floats(float (&f)[N]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                f[i] = __uint_as_float(this->w[i]);
            }
        } else if constexpr (sizeof(T) == 1) {
            constexpr int PER_WORD = N < 4 ? N : 4;
#pragma unroll
            for (int i = 0; i < N; i += PER_WORD) {
                float four[4];
                fp8x4_to_floats<T>(this->w[i / PER_WORD], four);
#pragma unroll
                for (int j = 0; j < PER_WORD; ++j) {
                    f[i + j] = four[j];
                }
            }
        } else if constexpr (N == 1) {
            f[0] = to_float(T{this->w[0]});
        } else {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const float2 pair = unpack2<T>(this->w[i]);
                f[2 * i] = pair.x;
                f[2 * i + 1] = pair.y;
            }
        }
    }

    PYINFER_DEVICE static raw_vec from_floats(const float (&f)[N]) {
        raw_vec v;
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                v.w[i] = __float_as_uint(f[i]);
            }
        } else if constexpr (sizeof(T) == 1 && N == 1) {
            v.w[0] = static_cast<uint8_t>(pack_fp8x2<T>(f[0], 0.0f));
        } else if constexpr (sizeof(T) == 1 && N == 2) {
            v.w[0] = static_cast<uint16_t>(pack_fp8x2<T>(f[0], f[1]));
        } else if constexpr (sizeof(T) == 1) {
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
                v.w[i] = pack_fp8x2<T>(f[4 * i], f[4 * i + 1]) | pack_fp8x2<T>(f[4 * i + 2], f[4 * i + 3]) << 16;
            }
        } else if constexpr (N == 1) {
            v.w[0] = from_float<T>(f[0]).bits;
        } else {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                v.w[i] = pack2<T>(f[2 * i], f[2 * i + 1]);
            }
        }
        return v;
    }
};

// N consecutive elements as floats, by as many accesses as it takes. `p` must be aligned to the least of 16 bytes and all of them.
template <typename T, int N>
PYINFER_DEVICE void load_floats(const T* p, float (&f)[N]) {
    constexpr int PIECE = N * static_cast<int>(sizeof(T)) > 16 ? 16 / static_cast<int>(sizeof(T)) : N;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
        float piece[PIECE];
        raw_vec<T, PIECE>::load(p + i).to_floats(piece);
#pragma unroll
        for (int j = 0; j < PIECE; ++j) {
            f[i + j] = piece[j];
        }
    }
}
