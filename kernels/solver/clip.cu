// The scale of one group as the sweep reaches it, judged by ‖δ R‖², the output error that later columns cannot repair: clip to
// 1.00, 0.99 ... of the largest weight (MARLIN's search). A thread block owns 32 rows; for every candidate their errors δ go to
// shared memory, and a product with the triangle R follows in which each warp owns 16 columns and stops at the diagonal.
#include "solver/grid.cuh"

constexpr int kCandidates = 76;
constexpr int kPadded = kRows + 4;  // keeps the transposed errors off each other's banks

struct ClipArguments {
    const float* weight;  // [N, 128]
    const float* factor;  // [K, K] R, from this block's first row and column on
    float* scales;        // [N, groups] from this block's group on
    long long stride;     // K
    int rows;
    int groups;
    int bfloat16;
    float ratios[kCandidates];
};

__global__ void __launch_bounds__(kThreads) clip_kernel(const ClipArguments a) {
    extern __shared__ float shared[];
    float* factor = shared;                        // [128][128]
    float* errors = factor + kColumns * kColumns;  // [128][kPadded], transposed
    float* partial = errors + kColumns * kPadded;  // [8 warps][32 rows]
    load_square<false>(factor, a.factor, a.stride, kColumns);

    const int lane = threadIdx.x % kLanes, local = threadIdx.x / kLanes;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + local;
    const long long row = own < a.rows ? own : a.rows - 1;
    float weight[kOwned], widest = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        weight[i] = a.weight[row * kColumns + column_of(lane, i / 4, i % 4)];
        widest = fmaxf(widest, fabsf(weight[i]));
    }
    widest = row_max(widest) * (2.0f / (kLevels - 1));
    float best = storable(widest, a.bfloat16), best_cost = __int_as_float(0x7f800000);

    // Warps w and 7 - w share a scheduler's work evenly: their triangles add up to the same.
    const int warp = threadIdx.x / 32, within = threadIdx.x % 32;
    const int strip = warp < 4 ? warp : 11 - warp;
    const int column = 16 * strip + 4 * (within % 4), first = 4 * (within / 4);
    for (int candidate = 0; candidate < kCandidates; ++candidate) {
        const float scale = storable(widest * a.ratios[candidate], a.bfloat16);
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
            errors[column_of(lane, i / 4, i % 4) * kPadded + local] = decode(encode(weight[i], scale), scale) - weight[i];
        }
        __syncthreads();
        float output[4][4] = {};
        const int stop = 16 * strip + 16;
#pragma unroll 4
        for (int k = 0; k < stop; ++k) {
            const float4 r = *reinterpret_cast<const float4*>(factor + k * kColumns + column);
            const float4 e = *reinterpret_cast<const float4*>(errors + k * kPadded + first);
            const float es[4] = {e.x, e.y, e.z, e.w}, rs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) output[i][j] += es[i] * rs[j];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += output[i][j] * output[i][j];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (within % 4 == 0) partial[strip * kRows + first + i] = sum;
        }
        __syncthreads();
        float cost = 0.0f;
#pragma unroll
        for (int s = 0; s < 8; ++s) cost += partial[s * kRows + local];
        if (cost < best_cost) {
            best_cost = cost;
            best = scale;
        }
    }
    if (own < a.rows && lane == 0) a.scales[own * a.groups] = best;
}
