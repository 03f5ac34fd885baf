// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). pyinfer/cpu/philox.py is
// its twin: same key and counter, same bits. There is no state: a draw is a function of (seed, offset, word), whoever computes it.
#pragma once

#include "common/types.cuh"

struct PhiloxCounter {
    uint32_t x[4];
};

PYINFER_DEVICE PhiloxCounter philox4x32_10(PhiloxCounter c, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c.x[0]), low0 = 0xD2511F53u * c.x[0];
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c.x[2]), low1 = 0xCD9E8D57u * c.x[2];
        c = PhiloxCounter{{high1 ^ c.x[1] ^ key0, low1, high0 ^ c.x[3] ^ key1, low0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// 64 uniform bits of stream `seed` (the key) at `offset` (low half of the counter); `word` is counter word 2.
PYINFER_DEVICE uint64_t philox_bits(uint64_t seed, uint64_t offset, uint32_t word) {
    const PhiloxCounter counter{{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), word, 0u}};
    const PhiloxCounter r = philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return static_cast<uint64_t>(r.x[1]) << 32 | r.x[0];
}

// An integer uniform on 0..n-1 (0 < n), up to a bias below n / 2^64.
PYINFER_DEVICE uint64_t philox_scale(uint64_t bits, uint64_t n) {
    return __umul64hi(bits, n);
}
