// What kernels take from CUDA, on a CPU: a CTA of up to 512 lanes, each a fiber that runs until it waits for others.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <ucontext.h>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef THREADS
#define THREADS 256
#endif
#ifndef __shared__  // `static` where it is not `extern`
#define __shared__
#endif
#define __align__(n) __attribute__((aligned(n)))
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
struct alignas(16) Vec16 {
    u32 word[4];
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
struct Index {
    u32 x;
} threadIdx, blockIdx;
extern __attribute__((aligned(128))) u8 pipeline[];
inline u32 shared_address(const void* p) { return static_cast<const u8*>(p) - pipeline; }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

struct Barrier {
    u32 threads, here, round;
};
struct Copy {
    u32 to;
    const void* from;
};
struct Fiber {
    ucontext_t context;
    const Barrier* waits_for;
    u32 round;
    bool done;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
} fibers[THREADS];
struct Warp {
    Barrier barrier;
    u32 address[32], a[32][4], b[32][2], shuffled[32];
} warps[THREADS / 32];
Barrier block;
ucontext_t scheduler;

inline void sync(Barrier& b) {
    Fiber& me = fibers[threadIdx.x];
    me.round = b.round;
    if (++b.here == b.threads) {
        b.here = 0;
        ++b.round;
        return;
    }
    me.waits_for = &b;
    swapcontext(&me.context, &scheduler);
}
inline Warp& warp_of_lane() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { sync(block); }
inline void __syncwarp() { sync(warp_of_lane().barrier); }
inline u32 __reduce_max_sync(u32, u32 value) {
    Warp& w = warp_of_lane();
    w.shuffled[threadIdx.x % 32] = value;
    sync(w.barrier);
    for (u32 other : w.shuffled) value = other > value ? other : value;
    sync(w.barrier);
    return value;
}
inline u32 __shfl_sync(u32, u32 value, int from) {
    Warp& w = warp_of_lane();
    w.shuffled[threadIdx.x % 32] = value;
    sync(w.barrier);
    value = w.shuffled[from];
    sync(w.barrier);
    return value;
}
