// Where mma.sync is the limit: the warps of a CTA share activations and weights in one pipeline of shared-memory stages, filled
// by cp.async with one barrier per stage. All of it but the products and the end of a tile, for activations of 16 and of 8
// bits.
#pragma once

#include "linear/epilogue.cuh"

// How a CTA's eight warps share the work of one stage. kWarpsN * kWarpsT * kWarpsK = 8.
template <int kN8_,         // n8 tiles of tokens per warp; a warp computes 64 outputs x (8 kN8) tokens
          int kWarpsN_,     // warps side by side along the outputs, 64 each
          int kWarpsT_,     // warps side by side along the tokens; each dequantises the same weights again
          int kWarpsK_,     // warps that split the inputs of a stage; their sums meet in shared memory at the end of a tile
          int kTilesK_,     // packed tiles along the inputs per stage
          int kStages_,     // stages of the pipeline; all but one are in flight
          int kScaleRows_,  // rows of scales of a packed tile
          int kBytes = kActivationBytes>  // of an activation that is multiplied
struct Wide {
    static constexpr int kN8 = kN8_, kWarpsN = kWarpsN_, kWarpsT = kWarpsT_, kWarpsK = kWarpsK_;
    static constexpr int kTilesK = kTilesK_, kStages = kStages_, kScaleRows = kScaleRows_;
    static constexpr int kTokens = 8 * kN8 * kWarpsT;
    static constexpr int kHalves = 2 * kTilesK / kWarpsK;     // halves of packed tiles per warp and stage
    static constexpr int kEpilogueWarps = kWarpsN * kWarpsT;  // warps that hold a finished tile's sums

    static constexpr int kTokenBytes = kTileColumns * kBytes;  // what a token has for a packed tile

    // A stage: codes, scales, activations. Eight rows of these must fall into different banks at the same inputs: rows of 128
    // bytes have their 16-byte units permuted for that, longer ones are 16 bytes longer.
    static constexpr bool kPermuted = kTilesK * kTokenBytes == 128;
    static constexpr int kRowBytes = kTilesK * kTokenBytes + (kPermuted ? 0 : 16);
    static constexpr int kScalesAt = kWarpsN * kTilesK * kTileBytes;
    static constexpr int kTokensAt = kScalesAt + kWarpsN * kTilesK * kScaleRows * kScaleBytes;
    static constexpr int kStageBytes = kTokensAt + kTokens * kRowBytes;

    static_assert(kWarpsN * kWarpsT * kWarpsK == kWarps, "eight warps");
    static_assert(kHalves == 1 || kHalves == 2, "a warp's share of a stage lies in one packed tile");
    static_assert(kStageBytes >= kWarps * 4 * 512, "the sum over warps borrows a stage");
    static_assert(kStages >= 2, "a pipeline");
    static_assert(!kPermuted || kTokensAt % 128 == 0, "rows of 128 bytes are aligned, so their units differ in three bits");

    // Where a 16-byte unit of a row lies.
    __device__ __forceinline__ static int place(int row, int unit) {
        return row * kRowBytes + (kPermuted ? unit ^ row % 8 : unit) * 16;
    }
};

// The stages of a run in order: up to kTilesK packed tiles each, none across the end of a work range.
template <class T>
struct StageIterator {
    PortableWork work;
    int step;
    bool more = true;

    __device__ __forceinline__ explicit StageIterator(const Problem& p)
        : work(PortableWork::first<T::kWarpsN>(p)), step(work.begin) {}

    __device__ __forceinline__ int count() const { return work.end - step < T::kTilesK ? work.end - step : T::kTilesK; }

    // True when the stage after this one belongs to another work, or there is none.
    __device__ __forceinline__ bool advance(const Problem& p) {
        step += T::kTilesK;
        if (step < work.end) return false;
        more = work.left > 0;
        if (more) {
            work.template next<T::kWarpsN>(p);
            step = 0;
        }
        return true;
    }
};

// Streams packed weights and scales into the pipeline. Everything but the step from tile to tile is an addition.
template <class T, int kGroup>
struct WeightStream {
    static constexpr int kRows = T::kTilesK * T::kScaleRows;  // of scales in a stage, for each packed tile along the outputs
    static_assert(T::kWarpsN * kRows * 8 <= kThreads, "one copy of scales per thread");

    const Problem& p;
    StageIterator<T> at;
    const u8 *codes, *scales;  // this thread's 16 bytes of the next stage
    int scale_n, scale_row;    // which of the stage's rows of scales this thread copies, if any

    __device__ __forceinline__ explicit WeightStream(const Problem& problem)
        : p(problem), at(problem), scale_n(threadIdx.x / 8 / kRows), scale_row(threadIdx.x / 8 % kRows) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const u64 tile = static_cast<u64>(at.work.tile_n) * p.tiles_k + at.step;
        codes = p.codes + tile * kTileBytes + threadIdx.x * 16;
        scales = p.scales + ((tile + static_cast<u64>(scale_n) * p.tiles_k) * T::kScaleRows + scale_row) * kScaleBytes +
                 threadIdx.x % 8 * 16;
    }

    // One packed tile is 4 KB: 16 bytes per thread. Tiles past the last output or input are left out.
    __device__ __forceinline__ void load(u32 stage) {
        if (!at.more) return;
        const int count = at.count(), tiles = p.tiles_n - at.work.tile_n;
#pragma unroll
        for (int n = 0; n < T::kWarpsN; ++n) {
            const u8* const source = codes + static_cast<u64>(n) * p.tiles_k * kTileBytes;
#pragma unroll
            for (int g = 0; g < T::kTilesK; ++g)
                if (g < count && n < tiles)
                    copy_async(stage + (n * T::kTilesK + g) * kTileBytes + threadIdx.x * 16, source + g * kTileBytes);
        }
        if constexpr (kGroup > 0)
            if (scale_n < T::kWarpsN && scale_n < tiles && scale_row < count * T::kScaleRows)
                copy_async(stage + T::kScalesAt + threadIdx.x * 16, scales);
        codes += T::kTilesK * kTileBytes;
        scales += kRows * kScaleBytes;
        if (at.advance(p)) seek();
    }
};

// Streams activations into the pipeline. Rows past the last token are neither loaded nor cleared: their columns of the product
// are never stored.
template <class T>
struct TokenStream {
    static constexpr int kRowChunks = T::kTilesK * T::kTokenBytes / 16;  // 16-byte units per row
    static constexpr int kRows = kThreads / kRowChunks;                  // rows that all threads copy at once
    static constexpr int kRounds = T::kTokens / kRows;
    static_assert(T::kTokens % kRows == 0, "whole rounds");
    static_assert(!T::kPermuted || kRows % 8 == 0, "a thread's units have one place in all its rows");

    const Problem& p;
    StageIterator<T> at;
    const u8* source;  // this thread's unit of the next stage, first round
    const int row, chunk;
    const u64 stride;  // bytes from row to row
    int rows_left;     // rows from this thread's first to the last token

    __device__ __forceinline__ explicit TokenStream(const Problem& problem)
        : p(problem), at(problem), row(threadIdx.x / kRowChunks), chunk(threadIdx.x % kRowChunks),
          stride(static_cast<u64>(problem.tiles_k) * T::kTokenBytes) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const int token = at.work.token_tile * T::kTokens + row;
        source = p.x + token * stride + at.step * T::kTokenBytes + chunk * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void load(u32 stage) {
        if (!at.more) return;
        if (chunk / (T::kTokenBytes / 16) < at.count()) {
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
                if (round * kRows < rows_left)
                    copy_async(stage + T::kTokensAt + T::place(round * kRows + row, chunk),
                               source + static_cast<u64>(round * kRows) * stride);
        }
        source += T::kTilesK * T::kTokenBytes;
        if (at.advance(p)) seek();
    }
};

// What a warp of a CTA has.
template <class T>
struct WideBlock {
    const Problem& p;
    u8* const pipeline;
    const int warp, lane, warp_n, warp_t, warp_k;
    float sums[4 * T::kN8][4];

    __device__ __forceinline__ WideBlock(const Problem& problem, u8* shared)
        : p(problem), pipeline(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_t(warp / T::kWarpsN % T::kWarpsT), warp_k(warp / T::kEpilogueWarps) {}

    // Adds the sums of the warps that split k into those of the first, in a fixed order. Borrows the stage just consumed: the
    // next write to it comes after the next barrier of the loop.
    __device__ __forceinline__ void reduce_over_warps(float4* scratch) {
#pragma unroll
        for (int b = 0; b < T::kN8; ++b) {
            __syncthreads();
            if (warp_k > 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scratch[(warp * 4 + i) * 32 + lane] = as_vector(sums[i * T::kN8 + b]);
            }
            __syncthreads();
            if (warp_k == 0) {
#pragma unroll
                for (int other = 1; other < T::kWarpsK; ++other)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        add(sums[i * T::kN8 + b], scratch[((other * T::kEpilogueWarps + warp) * 4 + i) * 32 + lane]);
            }
        }
    }

    // True if the sums are those of all CTAs that share the tile, or become so here.
    __device__ __forceinline__ bool complete(const PortableWork& work) {
        return work.whole(p) || reduce_over_ctas(p, work, blockIdx.x, warp, T::kEpilogueWarps, lane, sums);
    }

    __device__ __forceinline__ int first_token(const PortableWork& work) const {
        return work.token_tile * T::kTokens + warp_t * T::kN8 * 8;
    }
};

// Each kernel's own: a WideBlock that can
//   multiply(stage, count)  add the products of a stage that holds `count` packed tiles to `sums`
//   epilogue(work)          store the sums of a work range, or leave them to the warp that completes them
template <class T, class E, int kGroup>
struct Block;

template <class T, class E, int kGroup>
__device__ __forceinline__ void run(Block<T, E, kGroup>& block) {
    WeightStream<T, kGroup> weights(block.p);
    TokenStream<T> tokens(block.p);
    const u32 begin = shared_address(block.pipeline);
    // Weights do not depend on the previous kernel: the pipeline fills with them while that one finishes. They are part of
    // the first commit group of the activations, since groups complete in order.
#pragma unroll 1
    for (int s = 0; s < T::kStages - 1; ++s) weights.load(begin + s * T::kStageBytes);
    wait_for_previous_kernel();
    let_next_kernel_start();
#pragma unroll 1
    for (int s = 0; s < T::kStages - 1; ++s) {
        tokens.load(begin + s * T::kStageBytes);
        copy_async_commit();
    }
    u32 full = 0, empty = (T::kStages - 1) * T::kStageBytes;  // byte offsets: this stage, and the one consumed before it
    clear(block.sums);
    for (StageIterator<T> at(block.p); at.more;) {
        copy_async_wait<T::kStages - 2>();
        __syncthreads();  // this stage is full for all, and all are done with the one before it
        weights.load(begin + empty);
        tokens.load(begin + empty);
        copy_async_commit();
        block.multiply(block.pipeline + full, at.count());
        const PortableWork work = at.work;
        if (at.advance(block.p)) {
            if constexpr (T::kWarpsK > 1) block.reduce_over_warps(reinterpret_cast<float4*>(block.pipeline + full));
            if (block.warp_k == 0 && work.tile_n + block.warp_n < block.p.tiles_n) block.epilogue(work);
            clear(block.sums);
        }
        empty = full;
        full = full + T::kStageBytes == T::kStages * T::kStageBytes ? 0 : full + T::kStageBytes;
    }
}
