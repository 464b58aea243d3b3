// Clusters of CTAs (Hopper): a barrier in two halves, and writing into the shared memory of another CTA.
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

// `shared` names a place in this CTA; the same place in the cluster's CTA number `rank` is written.
__device__ __forceinline__ void store_to_cta(u32 shared, u32 rank, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %5;\n"
                 "st.shared::cluster.v4.f32 [there], {%1, %2, %3, %4};\n"
                 "}\n" ::"r"(shared),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(rank)
                 : "memory");
#endif
}

__device__ __forceinline__ void store_to_first_cta(u32 shared, const float (&v)[4]) { store_to_cta(shared, 0, v); }

// The place of this CTA's shared memory `shared` in CTA number `rank` of the cluster.
__device__ __forceinline__ u32 address_in_cta(u32 shared, u32 rank) {
    u32 there;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    return there;
#else
    return shared + rank;  // never called
#endif
}

// Writes 16 bytes into another CTA's shared memory and counts them at its barrier: no fence, and nobody waits for the writer.
__device__ __forceinline__ void send_to_cta(u32 there, const float (&v)[4], u32 barrier_there) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier_there)
                 : "memory");
#endif
}

// What this thread wrote to shared memory is seen by copies that are started afterwards.
__device__ __forceinline__ void copies_see_writes() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Shared memory to that of another CTA, counted in bytes at its barrier.
__device__ __forceinline__ void copy_to_cta(u32 there, u32 shared, u32 bytes, u32 barrier_there) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                 "r"(shared), "r"(bytes), "r"(barrier_there)
                 : "memory");
#endif
}
