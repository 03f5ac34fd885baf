// mbarrier, the bulk tensor copy (TMA) that completes on it, and what else warp-specialised kernels need (sm_90a): one function per instruction.
#pragma once
#include "common/types.cuh"

// Barriers are 8 bytes of shared memory, given by their 32-bit address. A phase ends when `arrivals` threads have arrived and all announced bytes
// have come; waiting for parity 0 waits for the first phase, parity 1 for the second, parity 0 for the third ...
PYINFER_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialisation visible to the copy engine; before a block barrier.
PYINFER_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PYINFER_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces `bytes` that copies will bring within this phase.
PYINFER_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns when the phase of this parity has ended (at once if the barrier is one phase further). try_wait suspends the thread for a while.
PYINFER_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra through;\n"
        "bra again;\n"
        "through:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A box of a 4-D tensor into shared memory; x is the contiguous axis. What lies outside the tensor becomes zeros and counts as bytes.
PYINFER_DEVICE void tma_load_4d(uint32_t destination, const TensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
PYINFER_DEVICE void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ordinary writes to shared memory before this are seen by tensor cores and copy engine after it.
PYINFER_DEVICE void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers 1..15 of `threads` threads, whole warps.
PYINFER_DEVICE void named_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
PYINFER_DEVICE void named_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// All warps of a warpgroup: registers per thread, from the block's pool or back to it.
template <int REGISTERS>
PYINFER_DEVICE void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
PYINFER_DEVICE void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
