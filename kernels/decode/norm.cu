// Residual addition and RMS norm in one pass: the row is read once, stays in registers, and leaves as the new residual and as
// its norm. One block per row. Rounded where the model's own code rounds: after the addition, after the norm, after the weight.
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 512, kMostVectors = 4;  // up to 16384 columns

struct NormArguments {
    u16* residual;      // [rows, columns], the sum is written back
    const u16* branch;  // [rows, columns] or null
    const u16* weight;  // [columns]
    u16* out;           // [rows, columns]
    float epsilon;
    int columns;
};

template <class E>
__global__ void __launch_bounds__(kThreads) add_norm_kernel(const __grid_constant__ NormArguments a) {
    __shared__ float sums[kThreads / 32];
    const int vectors = a.columns / 8;
    const u64 row = static_cast<u64>(blockIdx.x) * vectors;
    Vec16 weight[kMostVectors];  // no kernel writes it, so it is fetched while the one before still runs
#pragma unroll
    for (int i = 0; i < kMostVectors; ++i) {
        const int v = threadIdx.x + i * kThreads;
        if (v < vectors) weight[i] = reinterpret_cast<const Vec16*>(a.weight)[v];
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    float x[kMostVectors][8], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostVectors; ++i) {
        const int v = threadIdx.x + i * kThreads;
        if (v >= vectors) break;
        Vec16 own = reinterpret_cast<const Vec16*>(a.residual)[row + v];
        if (a.branch) {
            const Vec16 added = reinterpret_cast<const Vec16*>(a.branch)[row + v];
#pragma unroll
            for (int p = 0; p < 4; ++p)
                own.word[p] = E::round_pair(E::widen(own.word[p] & 0xFFFF) + E::widen(added.word[p] & 0xFFFF),
                                            E::widen(own.word[p] >> 16) + E::widen(added.word[p] >> 16));
            reinterpret_cast<Vec16*>(a.residual)[row + v] = own;
        }
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            x[i][p] = E::widen(own.word[p / 2] >> (16 * (p % 2)) & 0xFFFF);
            sum += x[i][p] * x[i][p];
        }
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += sums[warp];
    const float scale = rsqrtf(sum / a.columns + a.epsilon);
#pragma unroll
    for (int i = 0; i < kMostVectors; ++i) {
        const int v = threadIdx.x + i * kThreads;
        if (v >= vectors) break;
        Vec16 out;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 normed = E::round_pair(x[i][2 * p] * scale, x[i][2 * p + 1] * scale);
            out.word[p] = E::round_pair(E::widen(normed & 0xFFFF) * E::widen(weight[i].word[p] & 0xFFFF),
                                        E::widen(normed >> 16) * E::widen(weight[i].word[p] >> 16));
        }
        reinterpret_cast<Vec16*>(a.out)[row + v] = out;
    }
}
