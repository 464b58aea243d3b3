// Polish inside one block of columns: first the least-squares scale of each group for the codes as they are, then one pass of
// coordinate descent over the codes. `gradient` is (E H) for the columns of the block, from a matrix product.
//
//     scale   s + (sum_j q_j g_j) / (q H q), rounded as it will be stored, kept if that lowers the loss
//     code    the nearest level to q_j s + g_j / H_jj, given all other columns
#include "solver/grid.cuh"

struct DescendArguments {
    const float* weight;    // [N, K] from this block's first column on
    const float* gradient;  // [N, >= width]
    const float* hessian;   // [K, K] from this block's first row and column on
    const u8* kept;         // [N, K] 0 where the code stays what it is; only if kMasked
    float* scales;          // [N, groups] from this block's first group on; the groups of the block are neighbours
    u8* codes;              // [N, K]
    float* errors;          // [N, K] w - q, read and written
    float* change;          // [N, >= width] new minus old error
    long long stride;       // K
    long long gradient_stride;
    long long change_stride;
    int rows;
    int width;
    int groups;
    int bfloat16;
};

// Σ_j q_j H[j, :] over the columns j of one chunk.
template <int kChunk>
__device__ __forceinline__ void respond(float (&response)[kOwned], const float (&level)[kOwned], const float* shared,
                                        int lane) {
    for (int owner = 0; owner < kLanes; ++owner) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float q = __shfl_sync(~0u, level[4 * kChunk + k], owner, kLanes);
            add_row<0>(response, q, shared + (32 * kChunk + 4 * owner + k) * kColumns, lane);
        }
    }
}

template <int kGroup, int kFirst>
__device__ __forceinline__ void refit(float (&gradient)[kOwned], const float (&level)[kOwned], float& scale, bool bfloat16,
                                      const float* shared, int lane) {
    constexpr int kChunks = kGroup / 32;
    float response[kOwned] = {};
    respond<kFirst>(response, level, shared, lane);
    if constexpr (kChunks > 1) respond<kFirst + 1>(response, level, shared, lane);
    if constexpr (kChunks > 2) {
        respond<kFirst + 2>(response, level, shared, lane);
        respond<kFirst + 3>(response, level, shared, lane);
    }
    float slope = 0.0f, curvature = 0.0f;
#pragma unroll
    for (int i = 4 * kFirst; i < 4 * (kFirst + kChunks); ++i) {
        slope += level[i] * gradient[i];
        curvature += level[i] * response[i];
    }
    slope = row_sum(slope);
    curvature = row_sum(curvature);
    const float fitted = storable(scale + __fdiv_rn(slope, fmaxf(curvature, 1e-30f)), bfloat16);
    const float step = fitted - scale;
    const bool better =
        fitted * scale > 0.0f && fabsf(fitted) < 2.0f * fabsf(scale) && step * step * curvature < 2.0f * step * slope;
    if (!better) return;  // the same decision in all lanes of a row, and no lane is waited for below
    scale = fitted;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) gradient[i] -= step * response[i];
}

template <int kChunk, bool kMasked>
__device__ __forceinline__ void descend_chunk(float (&gradient)[kOwned], float (&level)[kOwned], float scale, u32 pruned,
                                              const float* shared, int width, int lane) {
    for (int owner = 0; owner < kLanes; ++owner) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            constexpr int kFirst = 4 * kChunk;
            const int column = 32 * kChunk + 4 * owner + k;
            if (column >= width) return;
            const float* row = shared + column * kColumns;
            const float old = level[kFirst + k];
            const float target = __fmul_rn(old, scale) + __fdiv_rn(gradient[kFirst + k], row[column]);
            float now = encode(target, scale) - kZero;
            if (kMasked && (pruned >> (kFirst + k) & 1)) now = old;
            if (lane == owner) level[kFirst + k] = now;
            const float change = __shfl_sync(~0u, __fmul_rn(old - now, scale), owner, kLanes);
            add_row<0>(gradient, change, row, lane);
        }
    }
}

// kGroup: columns per scale, 32, 64 or 128; 0 when a scale spans several blocks and is not refitted here.
template <int kGroup, bool kMasked>
__global__ void __launch_bounds__(kThreads, 2) descend_kernel(const DescendArguments a) {
    extern __shared__ float shared[];
    load_square<false>(shared, a.hessian, a.stride, a.width);
    const int lane = threadIdx.x % kLanes;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const bool present = own < a.rows;
    const long long row = present ? own : a.rows - 1;

    constexpr int kScales = kGroup ? kColumns / kGroup : 1;
    float gradient[kOwned], level[kOwned], scale[kScales];
    u32 pruned = 0;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        const bool inside = column < a.width;
        gradient[i] = inside ? a.gradient[row * a.gradient_stride + column] : 0.0f;
        level[i] = inside ? static_cast<float>(a.codes[row * a.stride + column]) - kZero : 0.0f;
        if (kMasked && inside && !a.kept[row * a.stride + column]) pruned |= 1u << i;
    }
#pragma unroll
    for (int u = 0; u < kScales; ++u) scale[u] = u * (kGroup ? kGroup : 1) < a.width ? a.scales[row * a.groups + u] : 1.0f;

    if constexpr (kGroup == 128) {
        refit<128, 0>(gradient, level, scale[0], a.bfloat16, shared, lane);
        descend_chunk<0, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<1, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<2, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<3, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
    } else if constexpr (kGroup == 64) {
        refit<64, 0>(gradient, level, scale[0], a.bfloat16, shared, lane);
        refit<64, 2>(gradient, level, scale[1], a.bfloat16, shared, lane);
        descend_chunk<0, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<1, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<2, kMasked>(gradient, level, scale[1], pruned, shared, a.width, lane);
        descend_chunk<3, kMasked>(gradient, level, scale[1], pruned, shared, a.width, lane);
    } else if constexpr (kGroup == 32) {
        refit<32, 0>(gradient, level, scale[0], a.bfloat16, shared, lane);
        refit<32, 1>(gradient, level, scale[1], a.bfloat16, shared, lane);
        refit<32, 2>(gradient, level, scale[2], a.bfloat16, shared, lane);
        refit<32, 3>(gradient, level, scale[3], a.bfloat16, shared, lane);
        descend_chunk<0, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<1, kMasked>(gradient, level, scale[1], pruned, shared, a.width, lane);
        descend_chunk<2, kMasked>(gradient, level, scale[2], pruned, shared, a.width, lane);
        descend_chunk<3, kMasked>(gradient, level, scale[3], pruned, shared, a.width, lane);
    } else {
        descend_chunk<0, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<1, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<2, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
        descend_chunk<3, kMasked>(gradient, level, scale[0], pruned, shared, a.width, lane);
    }
    if (!present) return;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        if (column >= a.width) continue;
        const float own_scale = scale[kGroup ? 32 * (i / 4) / kGroup : 0];
        const long long place = row * a.stride + column;
        const float error = a.weight[place] - __fmul_rn(level[i], own_scale);
        a.change[row * a.change_stride + column] = error - a.errors[place];
        a.errors[place] = error;
        a.codes[place] = static_cast<u8>(level[i] + kZero);
    }
    if (kGroup && lane == 0) {
#pragma unroll
        for (int u = 0; u < kScales; ++u) {
            if (u * kGroup < a.width) a.scales[row * a.groups + u] = scale[u];
        }
    }
}
