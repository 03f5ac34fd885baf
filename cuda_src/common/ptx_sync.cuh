// Ordering between kernels, blocks and threads: one function per instruction.
#pragma once
#include "common/types.cuh"

// Programmatic dependent launch. `pdl_wait` returns when the kernels this one depends on have ended and their writes are visible;
// without the launch attribute, and before sm_90, both do nothing. `pdl_launch_dependents` lets the next kernel's blocks start.
PYINFER_DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
PYINFER_DEVICE void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Adds at device scope and returns the old value. What this thread knows to be written before (by others of its block too, after a barrier) is visible
// to whoever sees the sum, and the other way round.
PYINFER_DEVICE int32_t atomic_add_acq_rel(int32_t* p, int32_t x) {
    int32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
    return old;
}

// Suspends the thread for about so long, at most twice.
PYINFER_DEVICE void nanosleep(uint32_t nanoseconds) {
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// Starts the fetch of a line into L2. The address must be mapped.
PYINFER_DEVICE void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
