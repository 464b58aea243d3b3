// Packed 2:4-sparse weights back to a plain [N, K] matrix, rounded once from the float32 product: the path for many rows hands
// it to cuBLAS.
#include "w24a16/sparse.cuh"
#include "linear/dequantize.cuh"

template <class E>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Weights w) {
    __shared__ __align__(16) u8 turned[kTurnedBytes];
    const int group = blockIdx.x % w.tiles_k, tile_n = blockIdx.x / w.tiles_k;
    const int lane = threadIdx.x / 2 % 32, i = threadIdx.x / 64 % 2 * 2 + threadIdx.x % 2, jj = threadIdx.x / 128;
    const int g = lane / 4, t = lane % 4;
    const u8* const half = w.codes + static_cast<u64>(blockIdx.x) * kSparseTile + jj * kSparseHalf;
    const uint2 q = *reinterpret_cast<const uint2*>(half + threadIdx.x % 128 * 8);
    const u32 pair = load_scale_pair<1>(w, tile_n, group, 0, g * 8 + i * 2);
    const float scale[2] = {half_to_float(pair & 0xFFFF), half_to_float(pair >> 16)};
#pragma unroll
    for (int r = 0; r < 8; ++r) {  // k32 step, 16 inputs of it, output: the quad of register r % 4 of the step's fragment
        const int step = r / 4, c = r / 2 % 2, h = r % 2;
        const u32 codes = (step ? q.y : q.x) >> (r % 4 * 4);
        const u32 word = *reinterpret_cast<const u32*>(half + kKeptBytes + (g * 4 + step * 2 + c) * 16 + i * 4);
        const u32 positions = word >> (h * 16 + t * 4);
        const float first = static_cast<int>(codes & E::Grid::kLevels - 1) - E::Grid::kZero,
                    second = static_cast<int>(codes >> 16 & E::Grid::kLevels - 1) - E::Grid::kZero;
        const u32 kept = E::Output::round_pair(first * scale[h], second * scale[h]);
        const u64 quad = static_cast<u64>(kept & 0xFFFF) << (positions & 3) * 16 | static_cast<u64>(kept >> 16)
                                                                                       << (positions >> 2 & 3) * 16;
        const int row = g * 8 + i * 2 + h, chunk = jj * 8 + step * 4 + c * 2 + t / 2;
        *reinterpret_cast<u64*>(turned + row * (kTileColumns * 2) + (chunk ^ g) * 16 + t % 2 * 8) = quad;
    }
    write_turned(w, turned, tile_n, group);
}
