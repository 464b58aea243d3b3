// A block's ring of shared-memory slots, and what fills it. A slot is up to kGroups groups of 128 inputs: packed tiles, their
// scales, activations. One barrier per slot tells that it is full and that another is empty.
#pragma once

#include "common/async_copy.cuh"
#include "w24a16/sparse.cuh"

// Where things lie in a slot, and how a block's threads share the copying.
template <int kThreads_, int kTokens_, int kTiles_, int kGroups_, int kRowStep_, int kUnitStep_>
struct Slot {
    static constexpr int kThreads = kThreads_, kTokens = kTokens_;
    static constexpr int kTiles = kTiles_;  // packed tiles side by side along the outputs
    static constexpr int kGroups = kGroups_;
    static constexpr int kRowStep = kRowStep_;    // bytes from token to token
    static constexpr int kUnitStep = kUnitStep_;  // bytes from 8 inputs to the next 8
    static constexpr int kScalesAt = kTiles * kGroups * kSparseTile;
    static constexpr int kTokensAt = kScalesAt + kTiles * kGroups * kScaleBytes;
    static constexpr int kTokenBytes = kRowStep < kUnitStep ? 16 * kGroups * kUnitStep : kTokens * kRowStep;
    static constexpr int kBytes = (kTokensAt + kTokenBytes + 127) / 128 * 128;
};

// The slots of a run in order, none across the end of a segment.
template <class S>
struct SlotCursor {
    Segment segment;
    int group;
    bool more = true;

    __device__ __forceinline__ explicit SlotCursor(const Problem& p)
        : segment(Segment::first<S::kTiles>(p)), group(segment.begin) {}

    __device__ __forceinline__ int count() const { return segment.end - group < S::kGroups ? segment.end - group : S::kGroups; }

    // True when the slot after this one belongs to another segment, or there is none.
    __device__ __forceinline__ bool advance(const Problem& p) {
        group += S::kGroups;
        if (group < segment.end) return false;
        more = segment.left > 0;
        if (more) {
            segment.template next<S::kTiles>(p);
            group = segment.begin;
        }
        return true;
    }
};

// Copies the next slot's weights and activations. Everything but the step from segment to segment is an addition, and all
// choices are predicates: no branch that could look divergent may stand between asynchronous products.
template <class S, bool kGrouped>
struct Loader {
    static constexpr int kWarps = S::kThreads / 32, kTeam = S::kThreads / S::kTiles;  // kTeam: threads that copy one tile
    // A warp copies 8 tokens x 64 bytes at a time: whole sectors there, different banks here.
    static constexpr int kAcross = 4 * S::kGroups;  // such patches side by side along the inputs
    static constexpr int kWarpsAcross = kAcross < kWarps ? kAcross : kWarps;
    static constexpr int kRows = kWarps / kWarpsAcross * 8;  // tokens that all warps copy at once
    static_assert(S::kThreads % S::kTiles == 0 && kWarps % kWarpsAcross == 0 && kAcross % kWarpsAcross == 0, "even shares");
    static_assert(kTeam >= S::kGroups * kScaleBytes / 16, "one copy of scales per thread");

    const Problem& p;
    SlotCursor<S> at;
    const int tile, member, row, unit;
    const u64 jump;  // bytes between tokens that this thread copies
    const u8 *codes, *scales, *tokens;
    int rows_left;  // tokens from this thread's first to the last
    bool has_outputs;

    __device__ __forceinline__ explicit Loader(const Problem& problem)
        : p(problem), at(problem), tile(threadIdx.x / kTeam), member(threadIdx.x % kTeam),
          row(threadIdx.x / 32 / kWarpsAcross * 8 + threadIdx.x % 8),
          unit(threadIdx.x / 32 % kWarpsAcross * 4 + threadIdx.x % 32 / 8),
          jump(static_cast<u64>(p.groups) * (kGroup * 2) * kRows) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const u64 place = static_cast<u64>(at.segment.tile_n + tile) * p.groups + at.group;
        codes = p.codes + place * kSparseTile + member * 16;
        scales = p.scales + place * kScaleBytes + member * 16;
        has_outputs = at.segment.tile_n + tile < p.tiles_n;
        const int token = at.segment.token_tile * S::kTokens + row;
        tokens = p.x + (static_cast<u64>(token) * p.groups + at.group) * (kGroup * 2) + unit * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void advance() {
        codes += S::kGroups * kSparseTile;
        scales += S::kGroups * kScaleBytes;
        tokens += S::kGroups * kGroup * 2;
        if (at.advance(p)) seek();
    }

    // The groups of a slot are one piece of memory for each tile.
    __device__ __forceinline__ void load_weights(u32 slot) const {
        const int count = at.more && has_outputs ? at.count() : 0;
        const u32 to = slot + tile * S::kGroups * kSparseTile + member * 16;
#pragma unroll
        for (int c = 0; c < S::kGroups * kSparseTile; c += kTeam * 16)
            copy_async_if(c + member * 16 < count * kSparseTile, to + c, codes + c);
        if constexpr (kGrouped)
            copy_async_if(member * 16 < count * kScaleBytes,
                          slot + S::kScalesAt + tile * S::kGroups * kScaleBytes + member * 16, scales);
    }

    // Rows past the last token are neither loaded nor cleared: their columns of the product are never stored.
    __device__ __forceinline__ void load_tokens(u32 slot) const {
        const int units = at.more ? at.count() * 16 : 0;
        const u32 to = slot + S::kTokensAt + unit * S::kUnitStep + row * S::kRowStep;
        const u8* from = tokens;
#pragma unroll
        for (int first = 0; first < S::kTokens; first += kRows, from += jump)
#pragma unroll
            for (int across = 0; across < 4 * kAcross; across += 4 * kWarpsAcross)
                copy_async_if(
                    first < rows_left && unit + across < units && (first + kRows <= S::kTokens || first + row < S::kTokens),
                    to + first * S::kRowStep + across * S::kUnitStep, from + across * 16);
    }
};

// Weights do not depend on the previous kernel: the ring fills with them while that one finishes. They are part of the first
// commit group of the activations, since groups complete in order.
template <class S, bool kGrouped>
__device__ __forceinline__ void fill(Loader<S, kGrouped>& loader, u32 ring, int slots) {
    Loader<S, kGrouped> tokens = loader;
#pragma unroll 1
    for (int s = 0; s < slots; ++s) {
        loader.load_weights(ring + s * S::kBytes);
        loader.advance();
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
#pragma unroll 1
    for (int s = 0; s < slots; ++s) {
        tokens.load_tokens(ring + s * S::kBytes);
        tokens.advance();
        copy_async_commit();
    }
}
