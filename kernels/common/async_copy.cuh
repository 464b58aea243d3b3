// Asynchronous copies from global to shared memory (sm_80 and later), and the plain loads that must not be cached or moved.
#pragma once

#include "common/types.cuh"

// 16 bytes past L1: weights are read once, activations are shared through L2.
__device__ __forceinline__ void copy_async(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same under a predicate instead of a branch, which would matter where tensor cores work asynchronously.
__device__ __forceinline__ void copy_async_if(bool wanted, u32 shared, const void* global) {
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.b32 wanted, %2, 0;\n"
                 "@wanted cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
                 "}\n" ::"r"(shared),
                 "l"(global), "r"(static_cast<int>(wanted))
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of the newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Partial sums of other CTAs: read from L2, where they were published, never from this SM's L1.
__device__ __forceinline__ float4 load_published(const float4* global) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}

// 16 bytes that nobody reads again, past L1.
__device__ __forceinline__ Vec16 load_once(const u8* global) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global));
    return v;
}

// Two words.
__device__ __forceinline__ void load_two(u32 (&words)[2], const u8* global) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(global));
}

// Counts this CTA in at a counter in global memory and returns how many were there before. Releases what the CTA wrote,
// and acquires what the CTAs before it wrote; a barrier on either side extends both to all threads.
__device__ __forceinline__ u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// What a counter holds; acquires like `arrive`.
__device__ __forceinline__ u32 peek(const u32* counter) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}
