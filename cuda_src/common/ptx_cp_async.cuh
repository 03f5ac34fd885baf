// cp.async: 16-byte copies from global to shared memory that pass no register.
#pragma once
#include "common/types.cuh"

// A generic pointer into shared memory as the 32-bit address that shared-memory instructions take.
PYINFER_DEVICE uint32_t smem_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or writes 16 zero bytes without reading if not `valid` (`source` must still be a mapped address). Bypasses
// L1 (.cg); L2 fetches whole 128-byte lines.
PYINFER_DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
}

// Copies the first `bytes` (0..16) of 16 bytes; zeros follow. The source is aligned to 16 bytes, and mapped even if nothing is read.
PYINFER_DEVICE void cp_async_16_partial(uint32_t destination, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}

// 16 bytes from registers to a shared-memory address.
PYINFER_DEVICE void store_shared_16(uint32_t destination, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(destination), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// The calling thread arrives at an mbarrier (given by its 32-bit address) when all copies that it has started so far are there. The arrival is one of those
// that the barrier was initialised for.
PYINFER_DEVICE void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Closes the calling thread's group of copies; an empty group is legal and completes at once.
PYINFER_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of the calling thread's latest groups are under way. Other threads see the data only after a barrier.
template <int N>
PYINFER_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
