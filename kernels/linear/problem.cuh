// The argument of the kernels, and a place in the work.
#pragma once

#include "common/types.cuh"

#define SCHEDULE_INLINE __device__ __forceinline__
#include "linear/schedule.cuh"

constexpr int kThreads = 256;  // eight warps
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 128;    // inputs per scale and per packed tile
constexpr int kTileRows = 64;  // outputs per packed tile
constexpr int kTileBytes = kTileRows * kGroup / 2;
constexpr int kHalfBytes = kTileBytes / 2;  // a packed tile is two halves of 64 inputs, each in one piece
constexpr int kScaleBytes = kTileRows * 2;

// The only argument, laid out by the host, which also does all divisions that can be done there.
struct Problem {
    const u8* x;       // [m, k] activations
    const u8* codes;   // [tiles_n, groups, 4096 bytes] packed weights
    const u8* scales;  // float16 [tiles_n, groups, 64], or [tiles_n, 1, 64] with one scale per output
    const u16* bias;   // [n] of the activations' type, or null
    u8* y;             // [m, n]
    float4* partials;  // two tiles of partial sums per block
    u32* arrivals;     // up to eight counters per block, zero between calls
    int m, n, tiles_n, groups;
    int token_tiles;    // ceil(m / tokens of a tile)
    int split;          // 0: stream-K. Else blocks work on whole tiles in clusters of so many, which split the inputs evenly
    Schedule schedule;  // of steps over blocks, or of tiles over clusters
};

// A stretch of one output tile that a block computes: groups `begin` to `end`. What a block does is a list of these.
// Tokens vary fastest along the line of tiles: blocks that meet the same weights do so at about the same time.
struct Segment {
    int begin, end;
    int token_tile, tile_n;  // tile_n: first packed tile along the outputs
    u32 tile, left;          // number of the tile on the line; steps (stream-K) or tiles that follow this segment

    // kTiles: packed tiles side by side in an output tile.
    template <int kTiles>
    __device__ __forceinline__ static Segment first(const Problem& p) {
        Segment s;
        if (p.split == 0) {
            const u32 step = p.schedule.first_step(blockIdx.x), steps = p.schedule.first_step(blockIdx.x + 1) - step;
            s.tile = step / p.groups;
            s.begin = step % p.groups;
            const u32 length = p.groups - s.begin < steps ? p.groups - s.begin : steps;
            s.end = s.begin + length;
            s.left = steps - length;
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

    // To the groups of the next tile; only if `left` is not zero.
    template <int kTiles>
    __device__ __forceinline__ void next(const Problem& p) {
        if (p.split == 0) {
            begin = 0;
            end = left < static_cast<u32>(p.groups) ? static_cast<int>(left) : p.groups;
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

    // This block's part of the inputs of a tile that a cluster works on.
    __device__ __forceinline__ void take_share(const Problem& p) {
        const u32 rank = blockIdx.x % p.split;
        begin = p.groups * rank / p.split;
        end = p.groups * (rank + 1) / p.split;
    }

    __device__ __forceinline__ bool whole(const Problem& p) const { return begin == 0 && end == p.groups; }
};
