// What a thread can ask about its CTA.
#pragma once

#include "common/types.cuh"

// The number of this warp, in a way that tells the compiler that all lanes have the same.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); }

// All threads of a CTA wait for each other, wherever in the program their warps are: `__syncthreads` is for one place.
template <int kThreads>
__device__ __forceinline__ void meet() {
    asm volatile("barrier.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ int dynamic_shared_bytes() {
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return static_cast<int>(bytes);
}
