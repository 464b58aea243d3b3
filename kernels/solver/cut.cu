// A float32 matrix as the sum of two matrices of 16 bits: `high` holds the upper 11 bits of every element, `low` the next 11.
// What float16 could not hold is brought into its range first, by factors for rows and columns; they are powers of two and
// round nothing.
#include "common/types.cuh"

constexpr int kThreads = 256;

struct CutArguments {
    const float* matrix;      // [rows, columns], `stride` elements from row to row
    const float* row_factor;  // [rows], or null: 1
    const float* column_factor;
    u16* high;  // [rows, columns], `out_stride` elements from row to row
    u16* low;   // the same, or null if nobody wants it
    long long stride;
    long long out_stride;
    int rows;
    int columns;
};

__device__ __forceinline__ u16 to_half(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

__device__ __forceinline__ float from_half(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

// kEach: neighbouring columns per thread, 4 where all rows are aligned to that, else 1.
template <int kEach>
__global__ void __launch_bounds__(kThreads) cut_kernel(const CutArguments a) {
    struct alignas(4 * kEach) Wide {
        float x[kEach];
    };
    struct alignas(2 * kEach) Narrow {
        u16 x[kEach];
    };
    const u64 item = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
    const u32 across = a.columns / kEach;
    const u64 row = item / across;
    const u32 column = item % across * kEach;
    if (row >= a.rows) return;
    const float row_factor = a.row_factor ? a.row_factor[row] : 1.0f;
    const Wide value = *reinterpret_cast<const Wide*>(a.matrix + row * a.stride + column);
    Narrow high, low;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const float x = value.x[i] * row_factor * (a.column_factor ? a.column_factor[column + i] : 1.0f);
        high.x[i] = to_half(x);
        low.x[i] = to_half(x - from_half(high.x[i]));
    }
    *reinterpret_cast<Narrow*>(a.high + row * a.out_stride + column) = high;
    if (a.low) *reinterpret_cast<Narrow*>(a.low + row * a.out_stride + column) = low;
}
