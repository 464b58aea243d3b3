// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, for 8 to 64 tokens at a time, on any GPU since Ampere.
//
// The transposed product: weights are the sparse operand A of mma.sp.m16n8k32 (16 outputs x 32 inputs), tokens are its eight
// columns. Scales are applied to float32 sums, as in the dense kernels, so the tensor cores see the exact integers -8..7.
#include "common/cluster.cuh"
#include "w24a16/ring.cuh"
#include "linear/finish.cuh"

// How a block's eight warps share the work of one slot. kWarpsN * kWarpsT * kWarpsK = 8.
template <int kBlocks_,    // n8 token blocks per warp; a warp computes 64 outputs x (8 kBlocks) tokens
          int kWarpsN_,    // warps side by side along the outputs, 64 each
          int kWarpsT_,    // warps side by side along the tokens; each dequantises the same weights again
          int kWarpsK_,    // warps that split the inputs of a slot; their sums meet in shared memory at the end of a tile
          int kSlots_,     // slots of the ring, one group of 128 inputs per kWarpsK; all but one are in flight
          int kResident_>  // blocks that must fit on a multiprocessor, which caps the registers
struct Warps : Slot<kThreads, 8 * kBlocks_ * kWarpsT_, kWarpsN_, kWarpsK_, kWarpsK_ * kGroup * 2 + 16, 16> {
    static constexpr int kBlocks = kBlocks_, kWarpsN = kWarpsN_, kWarpsT = kWarpsT_, kWarpsK = kWarpsK_;
    static constexpr int kSlots = kSlots_, kResident = kResident_;
    static constexpr int kFinishers = kWarpsN * kWarpsT;  // warps that hold a finished tile's sums
    static constexpr int kFragments = 4 * kBlocks;
    static_assert(kWarpsN * kWarpsT * kWarpsK == kWarps, "eight warps");
    static_assert(Warps::kBytes >= (kWarps - kFinishers) * kFragments * 512, "the sum over warps borrows a slot");
    static_assert(kSlots >= 2, "a ring");
};

template <class T, class E, bool kGrouped>
struct Block {
    const Problem& p;
    u8* const ring;
    const int warp, lane, warp_n, warp_t, warp_k;
    float sums[T::kFragments][4];

    __device__ __forceinline__ Block(const Problem& problem, u8* shared)
        : p(problem), ring(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_t(warp / T::kWarpsN % T::kWarpsT), warp_k(warp / T::kFinishers) {}

    __device__ __forceinline__ void run() {
        const u32 begin = shared_address(ring);
        const bool clustered = p.split > 1;
        if (clustered) cluster_arrive(false);  // this block has started, its memory may be written
        Loader<T, kGrouped> loader(p);
        fill(loader, begin, T::kSlots - 1);
        u32 full = 0, empty = (T::kSlots - 1) * T::kBytes;  // byte offsets: this slot, and the one consumed before it
        clear(sums);
        for (SlotCursor<T> at(p); at.more;) {
            copy_async_wait<T::kSlots - 2>();
            __syncthreads();  // this slot is full for all, and all are done with the one before it
            loader.load_weights(begin + empty);
            loader.load_tokens(begin + empty);
            loader.advance();
            copy_async_commit();
            if (warp_k < at.count()) multiply(full);
            const Segment segment = at.segment;
            if (at.advance(p)) {
                if constexpr (T::kWarpsK > 1) sum_over_warps(reinterpret_cast<float4*>(ring + full));
                const bool holds_sums = warp_k == 0 && segment.tile_n + warp_n < p.tiles_n;
                if (clustered) sum_over_cluster(holds_sums);
                if (holds_sums) finish(segment, clustered);
                clear(sums);
            }
            empty = full;
            full = full + T::kBytes == T::kSlots * T::kBytes ? 0 : full + T::kBytes;
        }
    }

    // This warp's group of a slot.
    __device__ __forceinline__ void multiply(u32 slot) {
        float part[T::kFragments][4];
        float (&into)[T::kFragments][4] = kGrouped ? part : sums;
        if constexpr (kGrouped) clear(part);
        const int tile = warp_n * T::kGroups + warp_k;
        const u8* const codes = ring + slot + tile * kSparseTile;
        const u32 tokens = shared_address(ring) + slot + T::kTokensAt + warp_t * T::kBlocks * 8 * T::kRowStep +
                           warp_k * kGroup * 2 + token_offset<1, T::kRowStep>(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply_sparse_half<E, T::kBlocks, T::kRowStep>(into, codes + half * kSparseHalf, tokens + half * kGroup, lane);
        if constexpr (kGrouped)
            add_scaled<T::kBlocks>(sums, part, load_scales(ring + slot + T::kScalesAt + tile * kScaleBytes, lane));
    }

    // Adds the sums of the warps that split k into those of the first, in a fixed order. Borrows the slot just consumed: the
    // next write to it comes after the next barrier of the loop.
    __device__ __forceinline__ void sum_over_warps(float4* scratch) {
        __syncthreads();
        if (warp_k > 0) {
            float4* const mine = scratch + (warp - T::kFinishers) * T::kFragments * 32 + lane;
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) mine[f * 32] = as_vector(sums[f]);
        }
        __syncthreads();
        if (warp_k == 0) {
#pragma unroll
            for (int other = 0; other < T::kWarpsK - 1; ++other) {
                const float4* const theirs = scratch + (other * T::kFinishers + warp) * T::kFragments * 32 + lane;
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f) add(sums[f], theirs[f * 32]);
            }
        }
    }

    // The sums of the blocks that split the inputs of the cluster's only tile meet in the first of them, in order of rank,
    // behind its ring.
    __device__ __forceinline__ void sum_over_cluster(bool holds_sums) {
        const u32 rank = blockIdx.x % p.split;
        const auto place = [&](u32 r) {
            return T::kSlots * T::kBytes + (((r - 1) * T::kFinishers + warp) * T::kFragments * 32 + lane) * 16;
        };
        cluster_wait();
        if (holds_sums && rank > 0) {
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) store_to_first_block(shared_address(ring) + place(rank) + f * 512, sums[f]);
        }
        cluster_arrive(holds_sums && rank > 0);
        cluster_wait();
        if (holds_sums && rank == 0) {
            for (int r = 1; r < p.split; ++r)
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f)
                    add(sums[f], *reinterpret_cast<const float4*>(ring + place(r) + f * 512));
        }
    }

    __device__ __forceinline__ void finish(const Segment& segment, bool clustered) {
        if (clustered ? blockIdx.x % p.split == 0
                      : segment.whole(p) || sum_over_blocks(p, segment, blockIdx.x, warp, T::kFinishers, lane, sums))
            store<E, kGrouped, T::kBlocks>(p, segment.tile_n + warp_n,
                                           segment.token_tile * T::kTokens + warp_t * T::kBlocks * 8, lane, sums);
    }
};

template <class T, class E, bool kGrouped>
__global__ void __launch_bounds__(kThreads, T::kResident) warps_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 ring[];
    Block<T, E, kGrouped>(p, ring).run();
}
