// Packed weights back to a plain [N, K] matrix, rounded once from the float32 product: the large-M path hands it to cuBLAS.
//
// One block per packed tile of 64 outputs x 128 inputs. Bytes per weight: half of one read, two written; the writes are what
// costs, so the tile is turned in shared memory and leaves in full 256-byte rows.
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 256, kGroup = 128, kTileRows = 64, kTileBytes = kTileRows * kGroup / 2;

struct Weights {
    const u8* codes;    // [tiles_n, groups, 4096 bytes]
    const u16* scales;  // float16 [tiles_n, scale_groups, 64]
    u8* out;            // [rows, k]
    int groups, scale_groups, rows;
};

template <class E>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Weights w) {
    __shared__ __align__(16) u8 turned[kTileRows * kGroup * 2];
    const int group = blockIdx.x % w.groups, tile_n = blockIdx.x / w.groups;
    const int jj = threadIdx.x / 128, i = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Vec16 q = *reinterpret_cast<const Vec16*>(w.codes + static_cast<u64>(blockIdx.x) * kTileBytes + threadIdx.x * 16);
    const u64 scale_row = static_cast<u64>(tile_n) * w.scale_groups + (w.scale_groups == 1 ? 0 : group);
    const u32 pair = *reinterpret_cast<const u32*>(w.scales + scale_row * kTileRows + g * 8 + i * 2);
    const float scale[2] = {half_to_float(pair & 0xFFFF), half_to_float(pair >> 16)};
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int p = 0; p < 4; ++p) {  // register p of the fragment: output p % 2, inputs 8 (p / 2) + 2t and the next
            const u32 codes = q.word[j] >> (4 * p);
            const float low = static_cast<int>(codes & 15) - 8, high = static_cast<int>(codes >> 16 & 15) - 8;
            const int row = g * 8 + i * 2 + p % 2, chunk = jj * 8 + j * 2 + p / 2;
            *reinterpret_cast<u32*>(turned + row * (kGroup * 2) + (chunk ^ g) * 16 + t * 4) =
                E::round_pair(low * scale[p % 2], high * scale[p % 2]);
        }
    __syncthreads();
    const u64 stride = static_cast<u64>(w.groups) * kGroup * 2;
#pragma unroll
    for (int c = threadIdx.x; c < kTileRows * kGroup / 8; c += kThreads) {
        const int row = c / 16, chunk = c % 16;
        if (tile_n * kTileRows + row < w.rows)
            *reinterpret_cast<Vec16*>(w.out + (tile_n * kTileRows + row) * stride + static_cast<u64>(group) * 256 + chunk * 16) =
                *reinterpret_cast<const Vec16*>(turned + row * (kGroup * 2) + (chunk ^ (row / 8)) * 16);
    }
}
