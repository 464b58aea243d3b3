// The argument of the Hopper kernels, and what each of their CTAs does.
#pragma once

#include "common/tma.cuh"

#include "linear/problem.cuh"

// The only argument, laid out by the host (`ops/linear/hopper.py`).
struct HopperProblem {
    TensorMap x;       // [m, k] activations, in boxes of one tile's tokens x 64 inputs, swizzled
    const u8* codes;   // [tiles_n, tiles_k, 4096 bytes] packed weights
    const u8* scales;  // float16 [tiles_n, tiles_k, scale rows, 64], or [tiles_n, 64] with one scale per output
    const u16* bias;   // [n] of the outputs' type, or null
    u8* y;             // [m, n]
    float4* partials;  // two tiles of partial sums per CTA
    u32* arrivals;     // a counter per warp and CTA, zero between calls
    int m, n, tiles_n, tiles_k;
    int token_tiles;   // ceil(m / tokens of a tile)
    int split;         // above 1: CTAs work in clusters of so many
    int tiles;         // on the line
    int shared_tiles;  // the first of them: each is split by a cluster, or `schedule` deals out their steps ("stream-K")
    Schedule schedule;
    u32 offset_per_scale;       // two float16: -(zero point) / growth; for float16 weights that are rounded. Or, for sums in
                                // float16, 1 / growth, with which scales are multiplied
    float growth;               // of sums of these
    const float* token_scales;  // [m], of activations that were rounded to 8 bits
};

// A CTA first takes its range of the tiles that are shared, then its whole tiles: sums of several CTAs are added while others
// still multiply. A cluster splits one tile, and that is all.
struct HopperWork : WorkRange {
    u32 next_whole;  // the whole tile that this CTA takes next, if there is one

    __device__ __forceinline__ static HopperWork first(const HopperProblem& p, u32 cta, u32 ctas) {
        HopperWork s;
        s.left = 0;
        s.next_whole = p.shared_tiles + cta;
        if (p.split > 1) {
            s.next_whole = p.tiles;
            const u32 rank = cta % p.split;
            s.tile = cta / p.split;
            s.begin = p.tiles_k * rank / p.split;
            s.end = p.tiles_k * (rank + 1) / p.split;
        } else if (p.shared_tiles > 0) {
            const u32 step = p.schedule.first_step(cta), steps = p.schedule.first_step(cta + 1) - step;
            s.tile = step / p.tiles_k;
            s.begin = step % p.tiles_k;
            s.take(p, steps);
        } else {
            s.take_whole(p, ctas);
        }
        return s;
    }

    __device__ __forceinline__ bool more(const HopperProblem& p) const {
        return left > 0 || next_whole < static_cast<u32>(p.tiles);
    }

    // To the next range; only if there are more.
    __device__ __forceinline__ void next(const HopperProblem& p, u32 ctas) {
        if (left > 0) {
            ++tile;
            begin = 0;
            end = left < static_cast<u32>(p.tiles_k) ? static_cast<int>(left) : p.tiles_k;
            left -= end;
        } else {
            take_whole(p, ctas);
        }
    }

    __device__ __forceinline__ void take_whole(const HopperProblem& p, u32 ctas) {
        tile = next_whole;
        next_whole += ctas;
        begin = 0;
        end = p.tiles_k;
    }

    __device__ __forceinline__ int token_tile(const HopperProblem& p) const { return tile % p.token_tiles; }
    __device__ __forceinline__ int output_tile(const HopperProblem& p) const { return tile / p.token_tiles; }
};
