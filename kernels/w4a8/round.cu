// Activations to e4m3 with a scale for each token, in the order in which `w4a8/hopper.cu` multiplies. One CTA per token.
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

__device__ __forceinline__ u32 larger_of_each(u32 a, u32 b) {
    u32 r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

template <class E>
__global__ void __launch_bounds__(kThreads) round_kernel(const __grid_constant__ RoundArguments a) {
    __shared__ u32 largest_of[kThreads / 32];
    const u64 row = static_cast<u64>(blockIdx.x) * a.k;
    const Vec16* const x = reinterpret_cast<const Vec16*>(a.x + row * 2);
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 pair = 0;  // without signs, the order of 16-bit floats is that of their bits; those that are not finite come last
#pragma unroll 4
    for (int v = threadIdx.x; v < a.k / 8; v += kThreads) {
        const Vec16 own = x[v];
#pragma unroll
        for (int p = 0; p < 4; ++p) pair = larger_of_each(pair, own.word[p] & 0x7FFF7FFF);
    }
    u32 largest = __reduce_max_sync(~0u, max(pair & 0xFFFF, pair >> 16));
    if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, largest_of[warp]);
    const float top = E::widen(largest), finite = top - top;  // zero, or not a number
    const float bound = fmaxf(top, kLeast) + finite, factor = kLargest / bound;
    if (threadIdx.x == 0) a.scales[blockIdx.x] = bound / kLargest;
    Vec16* const to = reinterpret_cast<Vec16*>(a.rounded + row);
#pragma unroll 2
    for (int v = threadIdx.x; v < a.k / kChunk; v += kThreads) {
        const Vec16 first = x[2 * v], second = x[2 * v + 1];
        Vec16 out;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 even = round_pair_to_e4m3(E::widen(first.word[p] & 0xFFFF) * factor,
                                                E::widen(second.word[p] & 0xFFFF) * factor);
            const u32 odd = round_pair_to_e4m3(E::widen(first.word[p] >> 16) * factor, E::widen(second.word[p] >> 16) * factor);
            out.word[p] = even | odd << 16;
        }
        to[v] = out;
    }
}
