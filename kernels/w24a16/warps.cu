// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, for 8 to 64 tokens at a time, on any GPU since Ampere.
//
// The transposed product: weights are the sparse operand A of mma.sp.m16n8k32 (16 outputs x 32 inputs), tokens are its eight
// columns. Scales are applied to float32 sums, as in the dense kernels, so the tensor cores see the exact integers -8..7.
#include "common/cluster.cuh"
#include "w24a16/pipeline.cuh"
#include "linear/epilogue.cuh"

// How a CTA's eight warps share the work of one stage. kWarpsN * kWarpsT * kWarpsK = 8.
template <int kN8_,         // n8 tiles of tokens per warp; a warp computes 64 outputs x (8 kN8) tokens
          int kWarpsN_,     // warps side by side along the outputs, 64 each
          int kWarpsT_,     // warps side by side along the tokens; each dequantises the same weights again
          int kWarpsK_,     // warps that split the inputs of a stage; their sums meet in shared memory at the end of a tile
          int kStages_,     // stages of the pipeline, one group of 128 inputs per kWarpsK; all but one are in flight
          int kCtasPerSm_>  // CTAs that must fit on an SM, which caps the registers
struct Warps : Stage<kThreads, 8 * kN8_ * kWarpsT_, kWarpsN_, kWarpsK_, kWarpsK_ * kTokenBytes + 16, 16> {
    static constexpr int kN8 = kN8_, kWarpsN = kWarpsN_, kWarpsT = kWarpsT_, kWarpsK = kWarpsK_;
    static constexpr int kStages = kStages_, kCtasPerSm = kCtasPerSm_;
    static constexpr int kEpilogueWarps = kWarpsN * kWarpsT;  // warps that hold a finished tile's sums
    static constexpr int kFragments = 4 * kN8;
    static_assert(kWarpsN * kWarpsT * kWarpsK == kWarps, "eight warps");
    static_assert(Warps::kStageBytes >= (kWarps - kEpilogueWarps) * kFragments * 512, "the sum over warps borrows a stage");
    static_assert(kStages >= 2, "a pipeline");
};

template <class T, class E, int kGroup>
struct Block {
    const Problem& p;
    u8* const pipeline;
    const int warp, lane, warp_n, warp_t, warp_k;
    float sums[T::kFragments][4];

    __device__ __forceinline__ Block(const Problem& problem, u8* shared)
        : p(problem), pipeline(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_t(warp / T::kWarpsN % T::kWarpsT), warp_k(warp / T::kEpilogueWarps) {}

    __device__ __forceinline__ void run() {
        const u32 begin = shared_address(pipeline);
        const bool clustered = p.split > 1;
        if (clustered) cluster_arrive(false);  // this CTA has started, its memory may be written
        Loader<T, kGroup> loader(p);
        fill(loader, begin, T::kStages - 1);
        u32 full = 0, empty = (T::kStages - 1) * T::kStageBytes;  // byte offsets: this stage, and the one consumed before it
        clear(sums);
        for (StageIterator<T> at(p); at.more;) {
            copy_async_wait<T::kStages - 2>();
            __syncthreads();  // this stage is full for all, and all are done with the one before it
            loader.load_weights(begin + empty);
            loader.load_tokens(begin + empty);
            loader.advance();
            copy_async_commit();
            if (warp_k < at.count()) multiply(full);
            const PortableWork work = at.work;
            if (at.advance(p)) {
                if constexpr (T::kWarpsK > 1) reduce_over_warps(reinterpret_cast<float4*>(pipeline + full));
                const bool holds_sums = warp_k == 0 && work.tile_n + warp_n < p.tiles_n;
                if (clustered) reduce_over_cluster(holds_sums);
                if (holds_sums) epilogue(work, clustered);
                clear(sums);
            }
            empty = full;
            full = full + T::kStageBytes == T::kStages * T::kStageBytes ? 0 : full + T::kStageBytes;
        }
    }

    // This warp's group of a stage.
    __device__ __forceinline__ void multiply(u32 stage) {
        float part[T::kFragments][4];
        float (&into)[T::kFragments][4] = kGroup > 0 ? part : sums;
        if constexpr (kGroup > 0) clear(part);
        const int tile = warp_n * T::kTilesK + warp_k;
        const u8* const codes = pipeline + stage + tile * kSparseTile;
        const u32 tokens = shared_address(pipeline) + stage + T::kTokensAt + warp_t * T::kN8 * 8 * T::kRowStep +
                           warp_k * kTokenBytes + token_offset<1, T::kRowStep>(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply_sparse_half<E, T::kN8, T::kRowStep>(into, codes + half * kSparseHalf, tokens + half * kHalfTokenBytes,
                                                         lane);
        if constexpr (kGroup > 0)
            add_scaled<T::kN8>(sums, part, load_scales(pipeline + stage + T::kScalesAt + tile * kScaleBytes, lane));
    }

    // Adds the sums of the warps that split k into those of the first, in a fixed order. Borrows the stage just consumed: the
    // next write to it comes after the next barrier of the loop.
    __device__ __forceinline__ void reduce_over_warps(float4* scratch) {
        __syncthreads();
        if (warp_k > 0) {
            float4* const mine = scratch + (warp - T::kEpilogueWarps) * T::kFragments * 32 + lane;
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) mine[f * 32] = as_vector(sums[f]);
        }
        __syncthreads();
        if (warp_k == 0) {
#pragma unroll
            for (int other = 0; other < T::kWarpsK - 1; ++other) {
                const float4* const theirs = scratch + (other * T::kEpilogueWarps + warp) * T::kFragments * 32 + lane;
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f) add(sums[f], theirs[f * 32]);
            }
        }
    }

    // The sums of the CTAs that split the inputs of the cluster's only tile meet in the first of them, in order of rank,
    // behind its pipeline.
    __device__ __forceinline__ void reduce_over_cluster(bool holds_sums) {
        const u32 rank = blockIdx.x % p.split;
        const auto place = [&](u32 r) {
            return T::kStages * T::kStageBytes + (((r - 1) * T::kEpilogueWarps + warp) * T::kFragments * 32 + lane) * 16;
        };
        cluster_wait();
        if (holds_sums && rank > 0) {
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f)
                store_to_first_cta(shared_address(pipeline) + place(rank) + f * 512, sums[f]);
        }
        cluster_arrive(holds_sums && rank > 0);
        cluster_wait();
        if (holds_sums && rank == 0) {
            for (int r = 1; r < p.split; ++r)
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f)
                    add(sums[f], *reinterpret_cast<const float4*>(pipeline + place(r) + f * 512));
        }
    }

    __device__ __forceinline__ void epilogue(const PortableWork& work, bool clustered) {
        if (clustered ? blockIdx.x % p.split == 0
                      : work.whole(p) || reduce_over_ctas(p, work, blockIdx.x, warp, T::kEpilogueWarps, lane, sums))
            store<E, kGroup, T::kN8>(p, work.tile_n + warp_n, work.token_tile * T::kTokens + warp_t * T::kN8 * 8, lane, sums);
    }
};

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(kThreads, T::kCtasPerSm) warps_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 pipeline[];
    Block<T, E, kGroup>(p, pipeline).run();
}
