// What a thread can ask about its CTA.
#pragma once

#include "common/types.cuh"

// The number of this warp, in a way that tells the compiler that all lanes have the same.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); }

__device__ __forceinline__ int dynamic_shared_bytes() {
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return static_cast<int>(bytes);
}
