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
