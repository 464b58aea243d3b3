// What a thread can ask about its CTA.
#pragma once
#include "common/types.cuh"
inline int uniform_warp() { return threadIdx.x / 32; }
template <int>
inline void meet() { __syncthreads(); }
inline int dynamic_shared_bytes() { return SHARED; }
