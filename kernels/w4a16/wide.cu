// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for 32 or 64 tokens at a time: bound by mma.sync and by what feeds it.
//
// The product is that of narrow.cu. Here the warps of a CTA share activations and weights in one pipeline of shared-memory
// stages, filled by cp.async with one barrier per stage, because activations are now as many bytes as weights.
#include "linear/epilogue.cuh"

// How a CTA's eight warps share the work of one stage. kWarpsN * kWarpsT * kWarpsK = 8.
template <int kN8_,         // n8 tiles of tokens per warp; a warp computes 64 outputs x (8 kN8) tokens
          int kWarpsN_,     // warps side by side along the outputs, 64 each
          int kWarpsT_,     // warps side by side along the tokens; each dequantises the same weights again
          int kWarpsK_,     // warps that split the inputs of a stage; their sums meet in shared memory at the end of a tile
          int kTilesK_,     // packed tiles along the inputs per stage
          int kStages_,     // stages of the pipeline; all but one are in flight
          int kScaleRows_>  // rows of scales of a packed tile
struct Wide {
    static constexpr int kN8 = kN8_, kWarpsN = kWarpsN_, kWarpsT = kWarpsT_, kWarpsK = kWarpsK_;
    static constexpr int kTilesK = kTilesK_, kStages = kStages_, kScaleRows = kScaleRows_;
    static constexpr int kTokens = 8 * kN8 * kWarpsT;
    static constexpr int kHalves = 2 * kTilesK / kWarpsK;     // halves of packed tiles per warp and stage
    static constexpr int kEpilogueWarps = kWarpsN * kWarpsT;  // warps that hold a finished tile's sums

    // A stage: codes, scales, activations.
    static constexpr int kRowBytes = kTilesK * kTokenBytes + 16;
    static constexpr int kScalesAt = kWarpsN * kTilesK * kTileBytes;
    static constexpr int kTokensAt = kScalesAt + kWarpsN * kTilesK * kScaleRows * kScaleBytes;
    static constexpr int kStageBytes = kTokensAt + kTokens * kRowBytes;

    static_assert(kWarpsN * kWarpsT * kWarpsK == kWarps, "eight warps");
    static_assert(kHalves == 1 || kHalves == 2, "a warp's share of a stage lies in one packed tile");
    static_assert(kStageBytes >= kWarps * 4 * 512, "the sum over warps borrows a stage");
    static_assert(kStages >= 2, "a pipeline");
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
    static constexpr int kRowChunks = T::kTilesK * kTokenBytes / 16;  // 16-byte units per row
    static constexpr int kRows = kThreads / kRowChunks;               // rows that all threads copy at once
    static constexpr int kRounds = T::kTokens / kRows;
    static_assert(T::kTokens % kRows == 0, "whole rounds");

    const Problem& p;
    StageIterator<T> at;
    const u8* source;  // this thread's unit of the next stage, first round
    const int row, chunk;
    const u64 stride;  // bytes from row to row
    int rows_left;     // rows from this thread's first to the last token

    __device__ __forceinline__ explicit TokenStream(const Problem& problem)
        : p(problem), at(problem), row(threadIdx.x / kRowChunks), chunk(threadIdx.x % kRowChunks),
          stride(static_cast<u64>(problem.tiles_k) * kTokenBytes) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const int token = at.work.token_tile * T::kTokens + row;
        source = p.x + token * stride + at.step * kTokenBytes + chunk * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void load(u32 stage) {
        if (!at.more) return;
        if (chunk / (kTokenBytes / 16) < at.count()) {
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
                if (round * kRows < rows_left)
                    copy_async(stage + T::kTokensAt + (round * kRows + row) * T::kRowBytes + chunk * 16,
                               source + static_cast<u64>(round * kRows) * stride);
        }
        source += T::kTilesK * kTokenBytes;
        if (at.advance(p)) seek();
    }
};

template <class T, class E, int kGroup>
struct Block {
    const Problem& p;
    u8* const pipeline;
    const int warp, lane, warp_n, warp_t, warp_k;
    float sums[4 * T::kN8][4];

    __device__ __forceinline__ Block(const Problem& problem, u8* shared)
        : p(problem), pipeline(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_t(warp / T::kWarpsN % T::kWarpsT), warp_k(warp / T::kEpilogueWarps) {}

    __device__ __forceinline__ void run() {
        WeightStream<T, kGroup> weights(p);
        TokenStream<T> tokens(p);
        const u32 begin = shared_address(pipeline);
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
        clear(sums);
        for (StageIterator<T> at(p); at.more;) {
            copy_async_wait<T::kStages - 2>();
            __syncthreads();  // this stage is full for all, and all are done with the one before it
            weights.load(begin + empty);
            tokens.load(begin + empty);
            copy_async_commit();
            multiply(pipeline + full, at.count());
            const PortableWork work = at.work;
            if (at.advance(p)) {
                if constexpr (T::kWarpsK > 1) reduce_over_warps(reinterpret_cast<float4*>(pipeline + full));
                if (warp_k == 0 && work.tile_n + warp_n < p.tiles_n) epilogue(work);
                clear(sums);
            }
            empty = full;
            full = full + T::kStageBytes == T::kStages * T::kStageBytes ? 0 : full + T::kStageBytes;
        }
    }

    // This warp's 64 outputs x 64 or 128 inputs of a stage that holds `count` packed tiles.
    __device__ __forceinline__ void multiply(const u8* stage, int count) {
        const int half0 = warp_k * T::kHalves, step = half0 / 2, tile = warp_n * T::kTilesK + step;
        if (step >= count) return;
        const u32 tokens = shared_address(stage) + T::kTokensAt + warp_t * T::kN8 * 8 * T::kRowBytes + half0 * kHalfTokenBytes +
                           token_offset<T::kN8, T::kRowBytes>(lane);
        const u8* const scales = stage + T::kScalesAt + tile * T::kScaleRows * kScaleBytes;
        if constexpr (kNarrowGroups<kGroup>) {
#pragma unroll 1
            for (int half = 0; half < T::kHalves; ++half) {
                const int number = half0 % 2 + half;
                multiply_groups<E, kGroup, T::kN8, T::kRowBytes>(sums, stage + tile * kTileBytes + number * kHalfBytes,
                                                                 scales + number * (T::kScaleRows / 2) * kScaleBytes,
                                                                 tokens + half * kHalfTokenBytes, lane);
            }
        } else {
            float part[4 * T::kN8][4];
            float (&into)[4 * T::kN8][4] = kGroup > 0 ? part : sums;
            if constexpr (kGroup > 0) clear(part);
#pragma unroll
            for (int half = 0; half < T::kHalves; ++half)
                multiply_half<E, T::kN8, T::kRowBytes>(into, stage + tile * kTileBytes + (half0 % 2 + half) * kHalfBytes,
                                                       tokens + half * kHalfTokenBytes, lane);
            if constexpr (kGroup > 0) add_scaled<T::kN8>(sums, part, load_scales(scales, lane));
        }
    }

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

    __device__ __forceinline__ void epilogue(const PortableWork& work) {
        if (work.whole(p) || reduce_over_ctas(p, work, blockIdx.x, warp, T::kEpilogueWarps, lane, sums))
            store<E, kGroup, T::kN8>(p, work.tile_n + warp_n, work.token_tile * T::kTokens + warp_t * T::kN8 * 8, lane, sums);
    }
};

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 pipeline[];
    Block<T, E, kGroup>(p, pipeline).run();
}
