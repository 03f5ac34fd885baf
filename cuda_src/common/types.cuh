// Element types, conversions and vector access. No CUDA header is included anywhere in cuda_src: NVRTC then compiles in a fraction of the time and
// nothing has to be installed beside it.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using size_t = decltype(sizeof(0));

static_assert(sizeof(int64_t) == 8 && sizeof(int32_t) == 4, "unexpected integer sizes");

#define PYINFER_DEVICE __device__ __forceinline__

// ---- type traits -----------------------------------------------------------------------------------------------------------------
template <typename A, typename B>
struct is_same {
    static constexpr bool value = false;
};
template <typename A>
struct is_same<A, A> {
    static constexpr bool value = true;
};
template <typename A, typename B>
constexpr bool is_same_v = is_same<A, B>::value;

template <bool CONDITION, typename A, typename B>
struct conditional {
    using type = A;
};
template <typename A, typename B>
struct conditional<false, A, B> {
    using type = B;
};
template <bool CONDITION, typename A, typename B>
using conditional_t = typename conditional<CONDITION, A, B>::type;

template <typename T>
PYINFER_DEVICE constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
PYINFER_DEVICE constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}
constexpr __host__ __device__ int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// ---- constants -------------------------------------------------------------------------------------------------------------------
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
PYINFER_DEVICE float infinity() {
    return __int_as_float(0x7f800000);
}

// ---- storage types: bits only, all arithmetic is in float ----------------------------------------------------------------------
struct alignas(2) f16 {
    uint16_t bits;
};
struct alignas(2) bf16 {
    uint16_t bits;
};
struct alignas(1) e4m3 {
    uint8_t bits;
};
struct alignas(1) e5m2 {
    uint8_t bits;
};

PYINFER_DEVICE float to_float(float x) {
    return x;
}
PYINFER_DEVICE float to_float(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}
PYINFER_DEVICE float to_float(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest even; overflow becomes infinity, NaN stays NaN.
template <typename T>
PYINFER_DEVICE T from_float(float x);
template <>
PYINFER_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
PYINFER_DEVICE f16 from_float<f16>(float x) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
template <>
PYINFER_DEVICE bf16 from_float<bf16>(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}

// Two values packed into one register, `lo` in the low half (the element with the lower index).
template <typename T>
PYINFER_DEVICE uint32_t pack2(float lo, float hi);
template <>
PYINFER_DEVICE uint32_t pack2<f16>(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <>
PYINFER_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

template <typename T>
PYINFER_DEVICE float2 unpack2(uint32_t x);
template <>
PYINFER_DEVICE float2 unpack2<f16>(uint32_t x) {
    return make_float2(to_float(f16{static_cast<uint16_t>(x)}), to_float(f16{static_cast<uint16_t>(x >> 16)}));
}
template <>
PYINFER_DEVICE float2 unpack2<bf16>(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

// ---- vectors: N elements moved by loads and stores of up to 16 bytes --------------------------------------------------------------
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) vec_t {
    T data[N];

    PYINFER_DEVICE T& operator[](int i) { return data[i]; }
    PYINFER_DEVICE const T& operator[](int i) const { return data[i]; }
    // `p` must be aligned to the vector's own alignment.
    PYINFER_DEVICE static vec_t load(const T* p) { return *reinterpret_cast<const vec_t*>(p); }
    PYINFER_DEVICE void store(T* p) const { *reinterpret_cast<vec_t*>(p) = *this; }
};

// The 128-byte descriptor that TMA instructions take; encoded on the host, passed by value.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
