// What dequantising dense and sparse weights has in common: the argument, the scales, the way out.
//
// One CTA per packed tile of 64 outputs x 128 inputs. Half a byte or less of a weight is read and two are written: the writes
// are what costs, so the tile is turned in shared memory and leaves in full 256-byte rows. There chunk c (8 inputs) of row r
// lies at chunk c ^ (r / 8), which spreads the writes over the banks.
#pragma once

#include "common/element.cuh"
#include "linear/problem.cuh"

struct Weights {
    const u8* codes;    // [tiles_n, tiles_k, bytes of a packed tile]
    const u16* scales;  // float16 [tiles_n, scale_groups, 64]
    u8* out;            // [rows, k]
    int tiles_k, scale_groups, rows;
};

constexpr int kTurnedBytes = kTileRows * kTileColumns * 2;

// Two neighbouring outputs' scales in one of the rows that a packed tile has.
template <int kRows>
__device__ __forceinline__ u32 load_scale_pair(const Weights& w, int tile_n, int tile_k, int within, int output) {
    const u64 row = static_cast<u64>(tile_n) * w.scale_groups + (w.scale_groups == 1 ? 0 : tile_k * kRows + within);
    return *reinterpret_cast<const u32*>(w.scales + row * kTileRows + output);
}

// Writes a CTA's tile, which all its threads have put into `turned`.
__device__ __forceinline__ void write_turned(const Weights& w, const u8* turned, int tile_n, int group) {
    __syncthreads();
    const u64 stride = static_cast<u64>(w.tiles_k) * kTileColumns * 2;
#pragma unroll
    for (int c = threadIdx.x; c < kTileRows * kTileColumns / 8; c += kThreads) {
        const int row = c / 16, chunk = c % 16;
        if (tile_n * kTileRows + row < w.rows)
            *reinterpret_cast<Vec16*>(w.out + (tile_n * kTileRows + row) * stride + static_cast<u64>(group) * 256 +
                                      chunk * 16) =
                *reinterpret_cast<const Vec16*>(turned + row * (kTileColumns * 2) + (chunk ^ (row / 8)) * 16);
    }
}
