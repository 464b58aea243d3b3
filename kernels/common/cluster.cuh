// Clusters of blocks (Hopper): a barrier in two halves, and writing into the shared memory of the first block.
#pragma once

#include "common/types.cuh"

// Every thread of the cluster alternates between arriving and waiting. Arriving `with_writes` releases what the thread wrote,
// which costs a fence; waiting acquires.
__device__ __forceinline__ void cluster_arrive(bool with_writes) {
#if __CUDA_ARCH__ >= 900
    if (with_writes) {
        asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    } else {
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    }
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// `shared` names a place in this block; the same place in the cluster's first block is written.
__device__ __forceinline__ void store_to_first_block(u32 shared, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, 0;\n"
        "st.shared::cluster.v4.f32 [there], {%1, %2, %3, %4};\n"
        "}\n" ::"r"(shared),
        "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
        : "memory");
#endif
}
