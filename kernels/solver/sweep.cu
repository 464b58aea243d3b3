// The column sweep inside one block of columns: each column is rounded on its own grid, and the columns after it pay for the
// error. What earlier blocks left to pay arrives as `owed`, from a matrix product.
//
//     t_i = w_i + owed_i + sum_{j < i} e_j M[j, i]        q_i = nearest level to t_i        e_i = w_i - q_i
#include "solver/grid.cuh"

struct SweepArguments {
    const float* weight;    // [N, K], columns in the order of the sweep, from this block's first on
    const float* owed;      // [N, >= width]
    const float* feedback;  // M from this block's first row and column on
    const float* scales;    // [N, groups]
    const int* group_of;    // [width] which scale a column has
    const u8* kept;         // [N, K] 0 where the value must be zero, in the order of the sweep; only if kMasked
    u8* codes;              // [N, K] from this block's first column on
    float* errors;          // [N, K] from this block's first column on
    long long stride;       // K
    long long owed_stride;
    long long feedback_stride;
    int rows;
    int width;
    int groups;
};

template <int kChunk, bool kMasked>
__device__ __forceinline__ void sweep_chunk(float (&target)[kOwned], const float (&weight)[kOwned],
                                            const float (&scale)[kOwned], u32 pruned, u32 (&codes)[4], const float* shared,
                                            int lane) {
    for (int owner = 0; owner < kLanes; ++owner) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            constexpr int kFirst = 4 * kChunk;
            float code = encode(target[kFirst + k], scale[kFirst + k]);
            if (kMasked && (pruned >> (kFirst + k) & 1)) code = kZero;
            float error = weight[kFirst + k] - decode(code, scale[kFirst + k]);
            if (lane == owner) codes[kChunk] |= static_cast<u32>(code) << (8 * k);
            error = __shfl_sync(~0u, error, owner, kLanes);
            add_row<kChunk>(target, error, shared + (32 * kChunk + 4 * owner + k) * kColumns, lane);
        }
    }
}

template <bool kMasked>
__global__ void __launch_bounds__(kThreads) sweep_kernel(const SweepArguments a) {
    extern __shared__ float shared[];
    load_square<true>(shared, a.feedback, a.feedback_stride, a.width);
    const int lane = threadIdx.x % kLanes;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const bool present = own < a.rows;
    const long long row = present ? own : a.rows - 1;

    float target[kOwned], weight[kOwned], scale[kOwned];
    u32 pruned = 0, codes[4] = {};
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        const bool inside = column < a.width;
        weight[i] = inside ? a.weight[row * a.stride + column] : 0.0f;
        target[i] = inside ? weight[i] + a.owed[row * a.owed_stride + column] : 0.0f;
        scale[i] = inside ? a.scales[row * a.groups + a.group_of[column]] : 1.0f;
        if (kMasked && inside && !a.kept[row * a.stride + column]) pruned |= 1u << i;
    }
    sweep_chunk<0, kMasked>(target, weight, scale, pruned, codes, shared, lane);
    sweep_chunk<1, kMasked>(target, weight, scale, pruned, codes, shared, lane);
    sweep_chunk<2, kMasked>(target, weight, scale, pruned, codes, shared, lane);
    sweep_chunk<3, kMasked>(target, weight, scale, pruned, codes, shared, lane);
    if (!present) return;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        if (column >= a.width) continue;
        const u32 code = codes[i / 4] >> (8 * (i % 4)) & 15;
        a.codes[row * a.stride + column] = static_cast<u8>(code);
        a.errors[row * a.stride + column] = weight[i] - decode(static_cast<float>(code), scale[i]);
    }
}
