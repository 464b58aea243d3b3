// Packed weights back to a plain [N, K] matrix, rounded once from the float32 product: the large-M path hands it to cuBLAS.
#include "linear/dequantize.cuh"
#include "linear/multiply.cuh"

// kGroup is 128, too, where an output has one scale.
template <class E, int kGroup>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Weights w) {
    __shared__ __align__(16) u8 turned[kTurnedBytes];
    const int tile_k = blockIdx.x % w.tiles_k, tile_n = blockIdx.x / w.tiles_k;
    const int jj = threadIdx.x / 128, i = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Vec16 q = *reinterpret_cast<const Vec16*>(w.codes + static_cast<u64>(blockIdx.x) * kTileBytes + threadIdx.x * 16);
    float scale[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (j == 0 || scale_row_of<kGroup>(j) != scale_row_of<kGroup>(j - 1)) {
            const int row = jj * (kScaleRows<kGroup> / 2) + scale_row_of<kGroup>(j);
            const u32 pair = load_scale_pair<kScaleRows<kGroup>>(w, tile_n, tile_k, row, g * 8 + i * 2);
            scale[0] = half_to_float(pair & 0xFFFF);
            scale[1] = half_to_float(pair >> 16);
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {  // register p of the fragment: output p % 2, inputs 8 (p / 2) + 2t and the next
            const u32 codes = q.word[j] >> (4 * p);
            const float low = static_cast<int>(codes & E::Grid::kLevels - 1) - E::Grid::kZero,
                        high = static_cast<int>(codes >> 16 & E::Grid::kLevels - 1) - E::Grid::kZero;
            const int row = g * 8 + i * 2 + p % 2, chunk = jj * 8 + j * 2 + p / 2;
            *reinterpret_cast<u32*>(turned + row * (kTileColumns * 2) + (chunk ^ g) * 16 + t * 4) =
                E::Output::round_pair(low * scale[p % 2], high * scale[p % 2]);
        }
    }
    write_turned(w, turned, tile_n, tile_k);
}
