// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for 32 or 64 tokens at a time: bound by mma.sync and by what feeds it.
//
// The product is that of narrow.cu. Here the warps of a block share activations and weights in one ring of shared-memory slots,
// filled by cp.async with one barrier per slot, because activations are now as many bytes as weights.
#include "linear/finish.cuh"

// How a block's eight warps share the work of one slot. kWarpsN * kWarpsT * kWarpsK = 8.
template <int kBlocks_,  // n8 token blocks per warp; a warp computes 64 outputs x (8 kBlocks) tokens
          int kWarpsN_,  // warps side by side along the outputs, 64 each
          int kWarpsT_,  // warps side by side along the tokens; each dequantises the same weights again
          int kWarpsK_,  // warps that split the inputs of a slot; their sums meet in shared memory at the end of a tile
          int kGroups_,  // groups of 128 inputs per slot
          int kSlots_>   // slots of the ring; all but one are in flight
struct Wide {
    static constexpr int kBlocks = kBlocks_, kWarpsN = kWarpsN_, kWarpsT = kWarpsT_, kWarpsK = kWarpsK_;
    static constexpr int kGroups = kGroups_, kSlots = kSlots_;
    static constexpr int kTokens = 8 * kBlocks * kWarpsT;
    static constexpr int kHalves = 2 * kGroups / kWarpsK;  // 64-input halves of groups per warp and slot
    static constexpr int kFinishers = kWarpsN * kWarpsT;   // warps that hold a finished tile's sums

    // A slot: codes, scales, activations.
    static constexpr int kRowBytes = kGroups * kGroup * 2 + 16;
    static constexpr int kScalesAt = kWarpsN * kGroups * kTileBytes;
    static constexpr int kTokensAt = kScalesAt + kWarpsN * kGroups * kScaleBytes;
    static constexpr int kSlotBytes = kTokensAt + kTokens * kRowBytes;

    static_assert(kWarpsN * kWarpsT * kWarpsK == kWarps, "eight warps");
    static_assert(kHalves == 1 || kHalves == 2, "a warp's share of a slot lies in one group");
    static_assert(kSlotBytes >= kWarps * 4 * 512, "the sum over warps borrows a slot");
    static_assert(kSlots >= 2, "a ring");
};

// The slots of a run in order: up to kGroups groups each, none across the end of a segment.
template <class T>
struct SlotCursor {
    Segment segment;
    int group;
    bool more = true;

    __device__ __forceinline__ explicit SlotCursor(const Problem& p)
        : segment(Segment::first<T::kWarpsN>(p)), group(segment.begin) {}

    __device__ __forceinline__ int count() const { return segment.end - group < T::kGroups ? segment.end - group : T::kGroups; }

    // True when the slot after this one belongs to another segment, or there is none.
    __device__ __forceinline__ bool advance(const Problem& p) {
        group += T::kGroups;
        if (group < segment.end) return false;
        more = segment.left > 0;
        if (more) {
            segment.template next<T::kWarpsN>(p);
            group = 0;
        }
        return true;
    }
};

// Streams packed weights and scales into the ring. Everything but the step from tile to tile is an addition.
template <class T, bool kGrouped>
struct WeightStream {
    const Problem& p;
    SlotCursor<T> at;
    const u8 *codes, *scales;  // this thread's 16 bytes of the next slot
    int scale_n, scale_group;  // which of the slot's rows of scales this thread copies, if any

    __device__ __forceinline__ explicit WeightStream(const Problem& problem)
        : p(problem), at(problem), scale_n(threadIdx.x / 8 / T::kGroups), scale_group(threadIdx.x / 8 % T::kGroups) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const u64 tile = static_cast<u64>(at.segment.tile_n) * p.groups + at.group;
        codes = p.codes + tile * kTileBytes + threadIdx.x * 16;
        scales = p.scales + (tile + static_cast<u64>(scale_n) * p.groups + scale_group) * kScaleBytes + threadIdx.x % 8 * 16;
    }

    // One packed tile is 4 KB: 16 bytes per thread. Tiles past the last output or group are left out.
    __device__ __forceinline__ void load(u32 slot) {
        if (!at.more) return;
        const int count = at.count(), tiles = p.tiles_n - at.segment.tile_n;
#pragma unroll
        for (int n = 0; n < T::kWarpsN; ++n) {
            const u8* const source = codes + static_cast<u64>(n) * p.groups * kTileBytes;
#pragma unroll
            for (int g = 0; g < T::kGroups; ++g)
                if (g < count && n < tiles)
                    copy_async(slot + (n * T::kGroups + g) * kTileBytes + threadIdx.x * 16, source + g * kTileBytes);
        }
        if constexpr (kGrouped)
            if (scale_n < T::kWarpsN && scale_n < tiles && scale_group < count)
                copy_async(slot + T::kScalesAt + threadIdx.x * 16, scales);
        codes += T::kGroups * kTileBytes;
        scales += T::kGroups * kScaleBytes;
        if (at.advance(p)) seek();
    }
};

// Streams activations into the ring. Rows past the last token are neither loaded nor cleared: their columns of the product
// are never stored.
template <class T>
struct TokenStream {
    static constexpr int kRowChunks = T::kGroups * kGroup / 8;  // 16-byte units per row
    static constexpr int kRows = kThreads / kRowChunks;         // rows that all threads copy at once
    static constexpr int kRounds = T::kTokens / kRows;
    static_assert(T::kTokens % kRows == 0, "whole rounds");

    const Problem& p;
    SlotCursor<T> at;
    const u8* source;  // this thread's unit of the next slot, first round
    const int row, chunk;
    const u64 stride;  // bytes from row to row
    int rows_left;     // rows from this thread's first to the last token

    __device__ __forceinline__ explicit TokenStream(const Problem& problem)
        : p(problem), at(problem), row(threadIdx.x / kRowChunks), chunk(threadIdx.x % kRowChunks),
          stride(static_cast<u64>(problem.groups) * (kGroup * 2)) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const int token = at.segment.token_tile * T::kTokens + row;
        source = p.x + token * stride + at.group * (kGroup * 2) + chunk * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void load(u32 slot) {
        if (!at.more) return;
        if (chunk / (kGroup / 8) < at.count()) {
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
                if (round * kRows < rows_left)
                    copy_async(slot + T::kTokensAt + (round * kRows + row) * T::kRowBytes + chunk * 16,
                               source + static_cast<u64>(round * kRows) * stride);
        }
        source += T::kGroups * (kGroup * 2);
        if (at.advance(p)) seek();
    }
};

template <class T, class E, bool kGrouped>
struct Block {
    const Problem& p;
    u8* const ring;
    const int warp, lane, warp_n, warp_t, warp_k;
    float sums[4 * T::kBlocks][4];

    __device__ __forceinline__ Block(const Problem& problem, u8* shared)
        : p(problem), ring(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_t(warp / T::kWarpsN % T::kWarpsT), warp_k(warp / T::kFinishers) {}

    __device__ __forceinline__ void run() {
        WeightStream<T, kGrouped> weights(p);
        TokenStream<T> tokens(p);
        const u32 begin = shared_address(ring);
        // Weights do not depend on the previous kernel: the ring fills with them while that one finishes. They are part of the
        // first commit group of the activations, since groups complete in order.
#pragma unroll 1
        for (int s = 0; s < T::kSlots - 1; ++s) weights.load(begin + s * T::kSlotBytes);
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (int s = 0; s < T::kSlots - 1; ++s) {
            tokens.load(begin + s * T::kSlotBytes);
            copy_async_commit();
        }
        u32 full = 0, empty = (T::kSlots - 1) * T::kSlotBytes;  // byte offsets: this slot, and the one consumed before it
        clear(sums);
        for (SlotCursor<T> at(p); at.more;) {
            copy_async_wait<T::kSlots - 2>();
            __syncthreads();  // this slot is full for all, and all are done with the one before it
            weights.load(begin + empty);
            tokens.load(begin + empty);
            copy_async_commit();
            multiply(ring + full, at.count());
            const Segment segment = at.segment;
            if (at.advance(p)) {
                if constexpr (T::kWarpsK > 1) sum_over_warps(reinterpret_cast<float4*>(ring + full));
                if (warp_k == 0 && segment.tile_n + warp_n < p.tiles_n) finish(segment);
                clear(sums);
            }
            empty = full;
            full = full + T::kSlotBytes == T::kSlots * T::kSlotBytes ? 0 : full + T::kSlotBytes;
        }
    }

    // This warp's 64 outputs x 64 or 128 inputs of a slot that holds `count` groups.
    __device__ __forceinline__ void multiply(const u8* slot, int count) {
        const int half0 = warp_k * T::kHalves, group = half0 / 2, tile = warp_n * T::kGroups + group;
        if (group >= count) return;
        float part[4 * T::kBlocks][4];
        float (&into)[4 * T::kBlocks][4] = kGrouped ? part : sums;
        if constexpr (kGrouped) clear(part);
        const u32 tokens = shared_address(slot) + T::kTokensAt + warp_t * T::kBlocks * 8 * T::kRowBytes + half0 * kGroup +
                           token_offset<T::kBlocks, T::kRowBytes>(lane);
#pragma unroll
        for (int half = 0; half < T::kHalves; ++half)
            multiply_half<E, T::kBlocks, T::kRowBytes>(into, slot + tile * kTileBytes + (half0 % 2 + half) * kHalfBytes,
                                                       tokens + half * kGroup, lane);
        if constexpr (kGrouped) add_scaled<T::kBlocks>(sums, part, load_scales(slot + T::kScalesAt + tile * kScaleBytes, lane));
    }

    // Adds the sums of the warps that split k into those of the first, in a fixed order. Borrows the slot just consumed: the
    // next write to it comes after the next barrier of the loop.
    __device__ __forceinline__ void sum_over_warps(float4* scratch) {
#pragma unroll
        for (int b = 0; b < T::kBlocks; ++b) {
            __syncthreads();
            if (warp_k > 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scratch[(warp * 4 + i) * 32 + lane] = as_vector(sums[i * T::kBlocks + b]);
            }
            __syncthreads();
            if (warp_k == 0) {
#pragma unroll
                for (int other = 1; other < T::kWarpsK; ++other)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        add(sums[i * T::kBlocks + b], scratch[((other * T::kFinishers + warp) * 4 + i) * 32 + lane]);
            }
        }
    }

    __device__ __forceinline__ void finish(const Segment& segment) {
        if (segment.whole(p) || sum_over_blocks(p, segment, blockIdx.x, warp, T::kFinishers, lane, sums))
            store<E, kGrouped, T::kBlocks>(p, segment.tile_n + warp_n,
                                           segment.token_tile * T::kTokens + warp_t * T::kBlocks * 8, lane, sums);
    }
};

template <class T, class E, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 ring[];
    Block<T, E, kGrouped>(p, ring).run();
}
