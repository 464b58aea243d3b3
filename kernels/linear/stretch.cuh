// What a block of the Hopper kernel does: a list of stretches of output tiles.
#pragma once

#include "common/bulk_copy.cuh"

#include "linear/problem.cuh"

// The only argument, laid out by the host (`ops/linear/hopper.py`).
struct HopperProblem {
    TensorMap x;       // [m, k] activations, in boxes of one tile's tokens x 64 inputs, swizzled
    const u8* codes;   // [tiles_n, groups, 4096 bytes] packed weights
    const u8* scales;  // float16 [tiles_n, groups, 64], or [tiles_n, 1, 64] with one scale per output
    const u16* bias;   // [n] of the activations' type, or null
    u8* y;             // [m, n]
    float4* partials;  // two tiles of partial sums per block
    u32* arrivals;     // a counter per warp and block, zero between calls
    int m, n, tiles_n, groups;
    int token_tiles;   // ceil(m / tokens of a tile)
    int split;         // above 1: units work in clusters of so many
    int tiles;         // on the line
    int shared_tiles;  // the first of them: each is split by a cluster, or `schedule` deals out their steps ("stream-K")
    Schedule schedule;
    u32 minus_eight_shrunk;  // two float16: -8 / growth; for float16 weights that are rounded
    float growth;            // of sums of these
};

// Groups `begin` to `end` of one output tile. What takes them is a unit: a block.
// Tokens vary fastest along the line of tiles: blocks that meet the same weights do so at about the same time.
// A block first takes its run of the tiles that are shared, then its whole tiles: sums of several blocks are added while others
// still multiply. A cluster splits one tile, and that is all.
struct Stretch {
    int begin, end;
    u32 tile;        // number on the line
    u32 left;        // steps of the run that follow this stretch
    u32 next_whole;  // the whole tile that this block takes next, if there is one

    __device__ __forceinline__ static Stretch first(const HopperProblem& p, u32 unit, u32 units) {
        Stretch s;
        s.left = 0;
        s.next_whole = p.shared_tiles + unit;
        if (p.split > 1) {
            s.next_whole = p.tiles;
            const u32 rank = unit % p.split;
            s.tile = unit / p.split;
            s.begin = p.groups * rank / p.split;
            s.end = p.groups * (rank + 1) / p.split;
        } else if (p.shared_tiles > 0) {
            const u32 step = p.schedule.first_step(unit), steps = p.schedule.first_step(unit + 1) - step;
            s.tile = step / p.groups;
            s.begin = step % p.groups;
            const u32 length = p.groups - s.begin < steps ? p.groups - s.begin : steps;
            s.end = s.begin + length;
            s.left = steps - length;
        } else {
            s.take_whole(p, units);
        }
        return s;
    }

    __device__ __forceinline__ bool more(const HopperProblem& p) const {
        return left > 0 || next_whole < static_cast<u32>(p.tiles);
    }

    // To the next stretch; only if there are more.
    __device__ __forceinline__ void next(const HopperProblem& p, u32 units) {
        if (left > 0) {
            ++tile;
            begin = 0;
            end = left < static_cast<u32>(p.groups) ? static_cast<int>(left) : p.groups;
            left -= end;
        } else {
            take_whole(p, units);
        }
    }

    __device__ __forceinline__ void take_whole(const HopperProblem& p, u32 units) {
        tile = next_whole;
        next_whole += units;
        begin = 0;
        end = p.groups;
    }

    __device__ __forceinline__ int token_tile(const HopperProblem& p) const { return tile % p.token_tiles; }
    __device__ __forceinline__ int output_tile(const HopperProblem& p) const { return tile / p.token_tiles; }
    __device__ __forceinline__ bool whole(const HopperProblem& p) const { return begin == 0 && end == p.groups; }
};
