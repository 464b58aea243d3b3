// A CTA's pipeline of shared-memory stages, and what fills it. A stage is up to kTilesK packed tiles along the inputs,
// their scales, activations. One barrier per stage tells that it is full and that another is empty.
#pragma once

#include "common/async_copy.cuh"
#include "w24a16/sparse.cuh"

// Where things lie in a stage, and how a CTA's threads share the copying.
template <int kThreads_, int kTokens_, int kTiles_, int kTilesK_, int kRowStep_, int kUnitStep_>
struct Stage {
    static constexpr int kThreads = kThreads_, kTokens = kTokens_;
    static constexpr int kTiles = kTiles_;  // packed tiles side by side along the outputs
    static constexpr int kTilesK = kTilesK_;
    static constexpr int kRowStep = kRowStep_;    // bytes from token to token
    static constexpr int kUnitStep = kUnitStep_;  // bytes from 8 inputs to the next 8
    static constexpr int kScalesAt = kTiles * kTilesK * kSparseTile;
    static constexpr int kTokensAt = kScalesAt + kTiles * kTilesK * kScaleBytes;
    static constexpr int kTokensSize = kRowStep < kUnitStep ? 16 * kTilesK * kUnitStep : kTokens * kRowStep;
    static constexpr int kStageBytes = (kTokensAt + kTokensSize + 127) / 128 * 128;
};

// The stages of a run in order, none across the end of a work range.
template <class S>
struct StageIterator {
    PortableWork work;
    int step;
    bool more = true;

    __device__ __forceinline__ explicit StageIterator(const Problem& p)
        : work(PortableWork::first<S::kTiles>(p)), step(work.begin) {}

    __device__ __forceinline__ int count() const { return work.end - step < S::kTilesK ? work.end - step : S::kTilesK; }

    // True when the stage after this one belongs to another work, or there is none.
    __device__ __forceinline__ bool advance(const Problem& p) {
        step += S::kTilesK;
        if (step < work.end) return false;
        more = work.left > 0;
        if (more) {
            work.template next<S::kTiles>(p);
            step = work.begin;
        }
        return true;
    }
};

// Copies the next stage's weights and activations. Everything but the step from range to range is an addition, and all
// choices are predicates: no branch that could look divergent may stand between asynchronous products.
template <class S, int kGroup>
struct Loader {
    static constexpr int kWarps = S::kThreads / 32,
                         kCopyThreads = S::kThreads / S::kTiles;  // kCopyThreads: threads that copy one tile
    // A warp copies 8 tokens x 64 bytes at a time: whole sectors there, different banks here.
    static constexpr int kAcross = 4 * S::kTilesK;  // such patches side by side along the inputs
    static constexpr int kWarpsAcross = kAcross < kWarps ? kAcross : kWarps;
    static constexpr int kRows = kWarps / kWarpsAcross * 8;  // tokens that all warps copy at once
    static_assert(S::kThreads % S::kTiles == 0 && kWarps % kWarpsAcross == 0 && kAcross % kWarpsAcross == 0, "even shares");
    static_assert(kCopyThreads >= S::kTilesK * kScaleBytes / 16, "one copy of scales per thread");

    const Problem& p;
    StageIterator<S> at;
    const int tile, member, row, unit;
    const u64 jump;  // bytes between tokens that this thread copies
    const u8 *codes, *scales, *tokens;
    int rows_left;  // tokens from this thread's first to the last
    bool has_outputs;

    __device__ __forceinline__ explicit Loader(const Problem& problem)
        : p(problem), at(problem), tile(threadIdx.x / kCopyThreads), member(threadIdx.x % kCopyThreads),
          row(threadIdx.x / 32 / kWarpsAcross * 8 + threadIdx.x % 8),
          unit(threadIdx.x / 32 % kWarpsAcross * 4 + threadIdx.x % 32 / 8),
          jump(static_cast<u64>(p.tiles_k) * kTokenBytes * kRows) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const u64 place = static_cast<u64>(at.work.tile_n + tile) * p.tiles_k + at.step;
        codes = p.codes + place * kSparseTile + member * 16;
        scales = p.scales + place * kScaleBytes + member * 16;
        has_outputs = at.work.tile_n + tile < p.tiles_n;
        const int token = at.work.token_tile * S::kTokens + row;
        tokens = p.x + (static_cast<u64>(token) * p.tiles_k + at.step) * kTokenBytes + unit * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void advance() {
        codes += S::kTilesK * kSparseTile;
        scales += S::kTilesK * kScaleBytes;
        tokens += S::kTilesK * kTokenBytes;
        if (at.advance(p)) seek();
    }

    // The packed tiles of a stage are one piece of memory for each tile.
    __device__ __forceinline__ void load_weights(u32 stage) const {
        const int count = at.more && has_outputs ? at.count() : 0;
        const u32 to = stage + tile * S::kTilesK * kSparseTile + member * 16;
#pragma unroll
        for (int c = 0; c < S::kTilesK * kSparseTile; c += kCopyThreads * 16)
            copy_async_if(c + member * 16 < count * kSparseTile, to + c, codes + c);
        if constexpr (kGroup > 0)
            copy_async_if(member * 16 < count * kScaleBytes,
                          stage + S::kScalesAt + tile * S::kTilesK * kScaleBytes + member * 16, scales);
    }

    // Rows past the last token are neither loaded nor cleared: their columns of the product are never stored.
    __device__ __forceinline__ void load_tokens(u32 stage) const {
        const int units = at.more ? at.count() * 16 : 0;
        const u32 to = stage + S::kTokensAt + unit * S::kUnitStep + row * S::kRowStep;
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

// Weights do not depend on the previous kernel: the pipeline fills with them while that one finishes. They are part of the
// first commit group of the activations, since groups complete in order.
template <class S, int kGroup>
__device__ __forceinline__ void fill(Loader<S, kGroup>& loader, u32 pipeline, int stages) {
    Loader<S, kGroup> tokens = loader;
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
        loader.load_weights(pipeline + s * S::kStageBytes);
        loader.advance();
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
        tokens.load_tokens(pipeline + s * S::kStageBytes);
        tokens.advance();
        copy_async_commit();
    }
}
