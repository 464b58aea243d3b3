// The argument of the kernels for any GPU, and what each of their CTAs does.
#pragma once

#include "common/types.cuh"

#define WORK_INLINE __device__ __forceinline__
#include "linear/work_range.cuh"

constexpr int kThreads = 256;  // eight warps
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 64;      // outputs of a packed tile
constexpr int kTileColumns = 128;  // inputs of a packed tile
constexpr int kTileBytes = kTileRows * kTileColumns / 2;
constexpr int kHalfBytes = kTileBytes / 2;                    // a packed tile is two halves of 64 inputs, each in one piece
constexpr int kScaleBytes = kTileRows * 2;                    // a row of scales: one for each output of a packed tile
constexpr int kActivationBytes = 2;                           // of an activation in memory
constexpr int kTokenBytes = kTileColumns * kActivationBytes;  // what a token has for a packed tile
constexpr int kHalfTokenBytes = kTokenBytes / 2;

// Rows of scales that a packed tile has, where inputs share a scale in groups of kGroup. With kGroup 0 an output has one scale,
// which no tile carries: it is applied at the end.
template <int kGroup>
constexpr int kScaleRows = kGroup == 0 ? 0 : kTileColumns / kGroup;

// The only argument, laid out by the host, which also does all divisions that can be done there.
struct Problem {
    const u8* x;       // [m, k] activations
    const u8* codes;   // [tiles_n, tiles_k, 4096 bytes] packed weights
    const u8* scales;  // float16 [tiles_n, tiles_k, scale rows, 64], or [tiles_n, 64] with one scale per output
    const u16* bias;   // [n] of the outputs' type, or null
    u8* y;             // [m, n]
    float4* partials;  // two tiles of partial sums per CTA
    u32* arrivals;     // up to eight counters per CTA, zero between calls
    int m, n, tiles_n, tiles_k;
    int token_tiles;    // ceil(m / tokens of a tile)
    int split;          // 0: stream-K. Else CTAs work on whole tiles in clusters of so many, which split the inputs evenly;
                        // `strip` has so many CTAs for each tile of tokens
    Schedule schedule;  // of steps over CTAs, of tiles over clusters, or of strips over CTAs
    const float* token_scales;  // [m], of activations that were rounded to 8 bits
};

// Whole tiles one after another, of which a cluster splits the inputs, or with stream-K a range of steps.
struct PortableWork : WorkRange {
    int token_tile, tile_n;  // tile_n: first packed tile along the outputs

    // kTiles: packed tiles side by side in an output tile.
    template <int kTiles>
    __device__ __forceinline__ static PortableWork first(const Problem& p) {
        PortableWork s;
        if (p.split == 0) {
            const u32 step = p.schedule.first_step(blockIdx.x), steps = p.schedule.first_step(blockIdx.x + 1) - step;
            s.tile = step / p.tiles_k;
            s.begin = step % p.tiles_k;
            s.take(p, steps);
        } else {
            const u32 cluster = blockIdx.x / p.split;
            s.tile = p.schedule.first_step(cluster);
            s.take_share(p);
            s.left = p.schedule.first_step(cluster + 1) - s.tile - 1;
        }
        s.token_tile = s.tile % p.token_tiles;
        s.tile_n = s.tile / p.token_tiles * kTiles;
        return s;
    }

    // To the next tile; only if `left` is not zero.
    template <int kTiles>
    __device__ __forceinline__ void next(const Problem& p) {
        if (p.split == 0) {
            begin = 0;
            end = left < static_cast<u32>(p.tiles_k) ? static_cast<int>(left) : p.tiles_k;
            left -= end;
        } else {
            take_share(p);
            --left;
        }
        ++tile;
        if (++token_tile == p.token_tiles) {
            token_tile = 0;
            tile_n += kTiles;
        }
    }

    // This CTA's part of the inputs of a tile that a cluster works on.
    __device__ __forceinline__ void take_share(const Problem& p) {
        const u32 rank = blockIdx.x % p.split;
        begin = p.tiles_k * rank / p.split;
        end = p.tiles_k * (rank + 1) / p.split;
    }
};
