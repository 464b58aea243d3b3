// The end of an output tile: sums of several CTAs become one, sums become outputs. All of it is the work of single warps,
// each with its own piece of the tile, so nothing here stops the rest of a CTA.
#pragma once

#include "common/async_copy.cuh"
#include "linear/multiply.cuh"

__device__ __forceinline__ void add(float (&to)[4], const float4& v) {
    to[0] += v.x;
    to[1] += v.y;
    to[2] += v.z;
    to[3] += v.w;
}

__device__ __forceinline__ float4 as_vector(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// Adds the sums of the CTAs that share a tile, of which this is number `me`; piece `piece` of `pieces` of it, in fragment
// order, which only this function has to understand. True for the warp that arrives last: it then holds the complete sums,
// added in the order of the CTAs, whoever was last. No CTA ever waits for another, so none can deadlock; the counter
// returns to zero for the next call.
template <class P, class S, int kFragments>
__device__ __forceinline__ bool reduce_over_ctas(const P& p, const S& at, u32 me, int piece, int pieces, int lane,
                                                 float (&sums)[kFragments][4]) {
    const u32 start = at.tile * p.tiles_k;
    const u32 first = p.schedule.cta_of(start), last = p.schedule.cta_of(start + p.tiles_k - 1);
    // A CTA begins at most one tile that it does not end and ends at most one that it does not begin: two places.
    const auto place = [&](u32 block, bool begins) {
        return p.partials + ((static_cast<u64>(block) * 2 + begins) * pieces + piece) * (kFragments * 32) + lane;
    };
    u32* const counter = p.arrivals + first * pieces + piece;
    const u32 others = last - first;
    u32 before = 0;
    if (lane == 0 && others == 1) before = peek(counter);
    before = __shfl_sync(0xFFFFFFFF, before, 0);
    if (others > 1 || before == 0) {  // else the other one of two is done, and needs nothing from this one
        float4* const mine = place(me, at.begin == 0);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mine[f * 32] = as_vector(sums[f]);
        __syncwarp();
        if (lane == 0) before = arrive(counter);  // releases the stores of the whole warp, which __syncwarp ordered before it
        before = __shfl_sync(0xFFFFFFFF, before, 0);
        if (before != others) return false;
    }
    __syncwarp();
    if (lane == 0) *counter = 0;
    if (others == 1) {  // a sum of two does not depend on their order
        const float4* const theirs = me == first ? place(last, false) : place(first, true);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) add(sums[f], load_published(theirs + f * 32));
        return true;
    }
    clear(sums);
#pragma unroll 1
    for (u32 block = first; block <= last; ++block) {
        const float4* const theirs = place(block, block == first);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) add(sums[f], load_published(theirs + f * 32));
    }
    return true;
}

// Outputs first_n to first_n + 63 of tokens first_token on. A lane holds eight neighbouring outputs of two tokens per n8 tile:
// two 16-byte stores.
template <class E, int kGroup, int kN8>
__device__ __forceinline__ void store(const Problem& p, int tile_n, int first_token, int lane,
                                      const float (&sums)[4 * kN8][4]) {
    const int n = tile_n * kTileRows + lane / 4 * 8;
    if (n >= p.n) return;
    float scale[8], bias[8];
#pragma unroll
    for (int o = 0; o < 8; ++o) {
        scale[o] = (kGroup > 0 ? 1.f : half_to_float(reinterpret_cast<const u16*>(p.scales)[n + o])) / E::kQuantum;
        bias[o] = p.bias != nullptr && n + o < p.n ? E::Output::widen(p.bias[n + o]) : 0.f;
    }
#pragma unroll
    for (int b = 0; b < kN8; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = first_token + b * 8 + lane % 4 * 2 + e;
            if (token >= p.m) continue;
            Vec16 v;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v.word[i] = E::Output::round_pair(sums[i * kN8 + b][e] * scale[2 * i] + bias[2 * i],
                                                  sums[i * kN8 + b][2 + e] * scale[2 * i + 1] + bias[2 * i + 1]);
            u8* const to = p.y + (static_cast<u64>(token) * p.n + n) * 2;
            if (p.n % 8 == 0) {
                *reinterpret_cast<Vec16*>(to) = v;
            } else {
#pragma unroll
                for (int o = 0; o < 8; ++o)
                    if (n + o < p.n) reinterpret_cast<u16*>(to)[o] = static_cast<u16>(v.word[o / 2] >> (o % 2 * 16));
            }
        }
}
