// Thread block clusters (sm_90 and newer): rank, barrier, and reading the shared memory of another block of the cluster. One function per instruction.
#pragma once
#include "common/types.cuh"

// Index of this block in its cluster.
PYINFER_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of all blocks of the cluster in two halves: what each wrote before it arrived, to its own shared memory too, the others see
// once they have waited. Whole warps call them.
PYINFER_DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
PYINFER_DEVICE void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
PYINFER_DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Address of block `rank`'s copy of a shared variable, for the loads below.
PYINFER_DEVICE uint32_t cluster_address(const void* own, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
    return address;
}
PYINFER_DEVICE uint32_t load_cluster_u32(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
PYINFER_DEVICE uint64_t load_cluster_u64(uint32_t address) {
    uint64_t x;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
    return x;
}
// Stores to such an address. They arrive before the sender's next `cluster_arrive` counts.
PYINFER_DEVICE void store_cluster(uint32_t address, const float2& x) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
PYINFER_DEVICE void store_cluster(uint32_t address, const float4& x) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
