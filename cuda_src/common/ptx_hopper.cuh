// More of sm_90's instructions, one function each: boxes of 3-D tensors, fetches to L2, a look at a barrier, stmatrix.
#pragma once
#include "common/ptx_mbarrier.cuh"

// A box of a 3-D tensor into shared memory; x is the contiguous axis. What lies outside the tensor becomes zeros and counts as bytes.
PYINFER_DEVICE void tma_load_3d(uint32_t destination, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
// A box on its way from memory to L2.
PYINFER_DEVICE void tma_prefetch_3d(const TensorMap* map, int x, int y, int z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(x), "r"(y), "r"(z) : "memory");
}

// Whether the phase of this parity has ended, without waiting.
PYINFER_DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
// Four 8x8 matrices of 16-bit elements from one warp's registers into shared memory: the inverse of ldmatrix_x4, lane l gives the address of row l % 8 of
// matrix l / 8.
PYINFER_DEVICE void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// The address of a product's operand for its descriptor.
// NOTE: in a cluster, a shared-memory address has the block's rank from bit 24 on; a descriptor's field is 14 bits of address / 16, and more would spill over.
PYINFER_DEVICE uint32_t operand_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p)) & 0x3ffffu;
}
// The matrix descriptor of a tile that is not swizzled, contiguous along the contraction: pieces of 8 rows x 16 bytes, 128 bytes in one; `leading` bytes
// from one to the next along the contraction, `stride` along the rows. (Swizzled ones: ptx_wgmma.cuh.)
PYINFER_DEVICE uint64_t wgmma_descriptor_plain(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32;
}
