// SparseGPT inside one block of columns: at the first column of a quad the two of its four columns are kept that would cost the
// most if given up, then column after column becomes its target or nothing, and the columns after it pay for the error. What
// earlier blocks left to pay arrives as `owed`, from a matrix product.
//
//     t_i = w_i + owed_i + sum_{j < i} e_j M[j, i]        v_i = t_i if kept, else 0        e_i = w_i - v_i
//
// What a quad holds is w + x, where x M = t - w shares out inside the quad what is owed so far; giving up column j costs
// (held_j R[j, j])^2.
#include "solver/grid.cuh"

struct ChooseArguments {
    const float* weight;    // [N, K] from this block's first column on
    const float* owed;      // [N, >= width]
    const float* feedback;  // M from this block's first row and column on
    const float* diagonal;  // [width] of R
    u8* kept;               // [N, K] from this block's first column on: 1 where the column is kept
    float* values;          // [N, K] likewise
    float* errors;          // [N, K] likewise
    long long stride;       // K
    long long owed_stride;
    long long feedback_stride;
    int rows;
    int width;  // a multiple of 4
};

// Which two of four: bit k is set where at most one score is larger; of equal ones the earlier is kept.
__device__ __forceinline__ u32 two_largest(const float (&score)[4]) {
    u32 two = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        int larger = 0;
#pragma unroll
        for (int other = 0; other < 4; ++other) larger += other < k ? score[other] >= score[k] : score[other] > score[k];
        two |= (larger < 2 ? 1u : 0u) << k;
    }
    return two;
}

template <int kChunk>
__device__ __forceinline__ void choose_chunk(float (&target)[kOwned], const float (&weight)[kOwned],
                                             const float (&diagonal)[kOwned], u32& kept, const float* shared, int lane) {
    constexpr int kFirst = 4 * kChunk;
    for (int owner = 0; owner < kLanes; ++owner) {  // all lanes reckon, what the owner finds counts
        const float* row = shared + (32 * kChunk + 4 * owner) * kColumns;
        const float* quad = row + 32 * kChunk + 4 * owner;
        float share[4], score[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            share[k] = target[kFirst + k] - weight[kFirst + k];
#pragma unroll
            for (int j = 0; j < k; ++j) share[k] -= share[j] * quad[j * kColumns + k];
            const float cost = (weight[kFirst + k] + share[k]) * diagonal[kFirst + k];
            score[k] = cost * cost;
        }
        const u32 two = two_largest(score);
        if (lane == owner) kept |= two << kFirst;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float error = weight[kFirst + k] - ((two >> k & 1) ? target[kFirst + k] : 0.0f);
            error = __shfl_sync(~0u, error, owner, kLanes);
            add_row<kChunk>(target, error, row + k * kColumns, lane);
        }
    }
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const ChooseArguments a) {
    extern __shared__ float shared[];
    load_square<true>(shared, a.feedback, a.feedback_stride, a.width);
    const int lane = threadIdx.x % kLanes;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const bool present = own < a.rows;
    const long long row = present ? own : a.rows - 1;

    float target[kOwned], weight[kOwned], diagonal[kOwned];
    u32 kept = 0;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        const bool inside = column < a.width;
        weight[i] = inside ? a.weight[row * a.stride + column] : 0.0f;
        target[i] = inside ? weight[i] + a.owed[row * a.owed_stride + column] : 0.0f;
        diagonal[i] = inside ? a.diagonal[column] : 0.0f;
    }
    choose_chunk<0>(target, weight, diagonal, kept, shared, lane);
    choose_chunk<1>(target, weight, diagonal, kept, shared, lane);
    choose_chunk<2>(target, weight, diagonal, kept, shared, lane);
    choose_chunk<3>(target, weight, diagonal, kept, shared, lane);
    if (!present) return;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        if (column >= a.width) continue;
        const long long place = row * a.stride + column;
        const float value = (kept >> i & 1) ? target[i] : 0.0f;  // a target stays as it was when its column was decided
        a.kept[place] = static_cast<u8>(kept >> i & 1);
        a.values[place] = value;
        a.errors[place] = weight[i] - value;
    }
}
