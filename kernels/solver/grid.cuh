// The INT4 grid and the division of labour that all solver kernels share.
//
// Rows never talk to each other, so eight neighbouring lanes own a row and walk its columns in lockstep. A block of 128 columns
// lies in their registers in chunks of 32: lane l holds columns 32 g + 4 l + k (g, k = 0..3), so that one 128-bit access of the
// eight lanes covers 32 neighbouring floats of a matrix row in shared memory, the same for all four rows of a warp.
#pragma once

#include "common/types.cuh"

constexpr int kColumns = 128;              // columns per block
constexpr int kLanes = 8;                  // lanes per row
constexpr int kOwned = kColumns / kLanes;  // columns per lane
constexpr int kThreads = 256;
constexpr int kRows = kThreads / kLanes;  // rows per thread block
constexpr float kZero = 8.0f;             // the code of the value 0
constexpr int kLevels = 16;               // codes that there are

// The nearest code of a value, ties to even, exactly as torch computes it on a CPU.
__device__ __forceinline__ float encode(float value, float scale) {
    return fminf(fmaxf(rintf(__fdiv_rn(value, scale)) + kZero, 0.0f), kLevels - 1.0f);
}

// Two roundings, as on a CPU: contracted into a subtraction the product would be exact.
__device__ __forceinline__ float decode(float code, float scale) { return __fmul_rn(code - kZero, scale); }

__device__ __forceinline__ float through_half(float x) {
    u16 h;
    float f;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ float through_bfloat16(float x) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return __uint_as_float(static_cast<u32>(h) << 16);
}

// The nearest scale that float16, and for a bfloat16 model bfloat16 too, holds exactly; never zero. Beyond float16: infinite.
__device__ __forceinline__ float storable(float scale, bool bfloat16) {
    float magnitude = fmaxf(fabsf(scale), 0x1p-24f);
    if (bfloat16) magnitude = through_bfloat16(magnitude);
    magnitude = through_half(magnitude);
    if (bfloat16) magnitude = through_half(through_bfloat16(magnitude));
    return copysignf(magnitude, scale);
}

// The place in the block of chunk g, element k of a lane.
__device__ __forceinline__ int column_of(int lane, int g, int k) { return 32 * g + 4 * lane + k; }

// The sum over the lanes of a row, the same in each of them.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// A square piece of a matrix into shared memory, zero outside `width`; with `kStrict`, only what lies right of the diagonal.
template <bool kStrict>
__device__ __forceinline__ void load_square(float* shared, const float* matrix, long long stride, int width) {
    for (int i = threadIdx.x; i < kColumns * kColumns; i += kThreads) {
        const int row = i / kColumns, column = i % kColumns;
        const bool inside = row < width && column < width && (!kStrict || column > row);
        shared[i] = inside ? matrix[row * stride + column] : 0.0f;
    }
    __syncthreads();
}

// x[c] += factor · row[c] for the columns of chunks `kFrom`..3.
template <int kFrom>
__device__ __forceinline__ void add_row(float (&x)[kOwned], float factor, const float* row, int lane) {
#pragma unroll
    for (int g = kFrom; g < 4; ++g) {
        const float4 m = *reinterpret_cast<const float4*>(row + 32 * g + 4 * lane);
        x[4 * g + 0] += factor * m.x;
        x[4 * g + 1] += factor * m.y;
        x[4 * g + 2] += factor * m.z;
        x[4 * g + 3] += factor * m.w;
    }
}
