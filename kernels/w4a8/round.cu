// Activations to e4m3 with a scale for each token, in the order in which `w4a8/{hopper,ada}.cu` multiply. One CTA per token.
//
// Of 16 inputs, input 8 c + i goes to byte 2 i + c. A token with a value that is not finite gets a scale that is not a number.
#include "common/element.cuh"

constexpr int kThreads = 256, kChunk = 16;  // inputs that a thread rounds at once

struct RoundArguments {
    const u8* x;    // [tokens, k]
    u8* rounded;    // [tokens, k]
    float* scales;  // [tokens]: x is about rounded times this
    int k;
};

constexpr float kLargest = 448.f, kLeast = 0x1p-100f;  // of e4m3; of a token's largest value, so that factors are finite

// Of two pairs of 15 bits. What Ada lacks, a difference tells: the bit above its minuend stays where that one is not smaller.
__device__ __forceinline__ u32 larger_of_each(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#else
    const u32 kept = ((a | kNegative) - b) & kNegative, mask = kept - (kept >> 15);
    return (a & mask) | (b & ~mask);
#endif
}

struct Chunk {
    Vec16 half[2];
};

__device__ __forceinline__ u32 larger_of(u32 pair, const Chunk& chunk) {
#pragma unroll
    for (int p = 0; p < 8; ++p) pair = larger_of_each(pair, chunk.half[p / 4].word[p % 4] & 0x7FFF7FFF);
    return pair;
}

template <class E>
__device__ __forceinline__ Vec16 rounded(const Chunk& chunk, float factor) {
    Vec16 out;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const u32 first = chunk.half[0].word[p], second = chunk.half[1].word[p];
        const u32 even = round_pair_to_e4m3(E::widen(first & 0xFFFF) * factor, E::widen(second & 0xFFFF) * factor);
        const u32 odd = round_pair_to_e4m3(E::widen(first >> 16) * factor, E::widen(second >> 16) * factor);
        out.word[p] = even | odd << 16;
    }
    return out;
}

// A thread keeps kHeld chunks in registers, and reads again what is beyond.
template <class E, int kHeld>
__global__ void __launch_bounds__(kThreads) round_kernel(const __grid_constant__ RoundArguments a) {
    __shared__ u32 largest_of[kThreads / 32];
    const u64 row = static_cast<u64>(blockIdx.x) * a.k;
    const int chunks = a.k / kChunk;
    const Chunk* const x = reinterpret_cast<const Chunk*>(a.x + row * 2);
    wait_for_previous_kernel();
    let_next_kernel_start();
    Chunk held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int c = threadIdx.x + i * kThreads;
        if (c < chunks) held[i] = x[c];
    }
    u32 pair = 0;  // without signs, the order of 16-bit floats is that of their bits; those that are not finite come last
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        if (static_cast<int>(threadIdx.x) + i * kThreads < chunks) pair = larger_of(pair, held[i]);
    for (int c = threadIdx.x + kHeld * kThreads; c < chunks; c += kThreads) pair = larger_of(pair, x[c]);
    u32 largest = __reduce_max_sync(~0u, max(pair & 0xFFFF, pair >> 16));
    if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, largest_of[warp]);
    const float top = E::widen(largest), finite = top - top;  // zero, or not a number
    const float bound = fmaxf(top, kLeast) + finite, factor = kLargest / bound;
    if (threadIdx.x == 0) a.scales[blockIdx.x] = bound / kLargest;
    Vec16* const to = reinterpret_cast<Vec16*>(a.rounded + row);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int c = threadIdx.x + i * kThreads;
        if (c < chunks) to[c] = rounded<E>(held[i], factor);
    }
    for (int c = threadIdx.x + kHeld * kThreads; c < chunks; c += kThreads) to[c] = rounded<E>(x[c], factor);
}
