// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for 32 or 64 tokens at a time: bound by mma.sync and by what feeds it.
//
// The product is that of narrow.cu. Here the warps of a CTA share activations and weights, because activations are now as many
// bytes as weights.
#include "linear/wide.cuh"

template <class T, class E, int kGroup>
struct Block : WideBlock<T> {
    using Warp = WideBlock<T>;
    using Warp::p, Warp::lane, Warp::warp_n, Warp::warp_t, Warp::warp_k, Warp::sums;
    using Warp::Warp;

    // This warp's 64 outputs x 64 or 128 inputs of a stage that holds `count` packed tiles.
    __device__ __forceinline__ void multiply(const u8* stage, int count) {
        const int half0 = warp_k * T::kHalves, step = half0 / 2, tile = warp_n * T::kTilesK + step;
        if (step >= count) return;
        const u32 tokens = shared_address(stage) + T::kTokensAt + warp_t * T::kN8 * 8 * T::kRowBytes + half0 * kHalfTokenBytes +
                           token_offset<T::kN8, T::kRowBytes>(lane);
        const u8* const scales = stage + T::kScalesAt + tile * T::kScaleRows * kScaleBytes;
        if constexpr (kNarrowGroups<kGroup>) {
#pragma unroll 1
            for (int half = 0; half < T::kHalves; ++half) {
                const int number = half0 % 2 + half;
                multiply_groups<E, kGroup, T::kN8, T::kRowBytes>(sums, stage + tile * kTileBytes + number * kHalfBytes,
                                                                 scales + number * (T::kScaleRows / 2) * kScaleBytes,
                                                                 tokens + half * kHalfTokenBytes, lane);
            }
        } else {
            float part[4 * T::kN8][4];
            float (&into)[4 * T::kN8][4] = kGroup > 0 ? part : sums;
            if constexpr (kGroup > 0) clear(part);
#pragma unroll
            for (int half = 0; half < T::kHalves; ++half)
                multiply_half<E, T::kN8, T::kRowBytes>(into, stage + tile * kTileBytes + (half0 % 2 + half) * kHalfBytes,
                                                       tokens + half * kHalfTokenBytes, lane);
            if constexpr (kGroup > 0) add_scaled<T::kN8>(sums, part, load_scales(scales, lane));
        }
    }

    __device__ __forceinline__ void epilogue(const PortableWork& work) {
        if (Warp::complete(work)) store<E, kGroup, T::kN8>(p, work.tile_n + warp_n, Warp::first_token(work), lane, sums);
    }
};

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 pipeline[];
    Block<T, E, kGroup> block(p, pipeline);
    run(block);
}
