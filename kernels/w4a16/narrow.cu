// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for up to 16 tokens at a time: bound by the bytes of the weights.
//
// The transposed product is computed: weights are operand A of mma.m16n8k16 (16 outputs x 16 inputs), tokens are its eight
// columns. One token therefore wastes an n8 block, not an m16 one, and a lane owns whole output rows, so that scales can be
// applied to float32 sums: the tensor cores see the exact integers -8..7.
//
// The warps of a block share nothing until the end of an output tile: each streams its own groups of 64 outputs x 128 inputs
// through its own ring, so the loop has no barrier, and eight warps are in eight different places of it. README.md has the
// layout of the packed weights, the reasoning and the measurements.
#include "common/cluster.cuh"
#include "linear/finish.cuh"

template <int kBlocks_,    // n8 token blocks: 8 or 16 tokens
          int kWarpsN_,    // warps side by side along the outputs, 64 each; the other 8 / kWarpsN split the inputs
          int kSlots_,     // half groups in a warp's ring
          int kResident_>  // blocks that must fit on a multiprocessor, which caps the registers
struct Narrow {
    static constexpr int kBlocks = kBlocks_, kWarpsN = kWarpsN_, kSlots = kSlots_, kResident = kResident_;
    static constexpr int kWarpsK = kWarps / kWarpsN;
    static constexpr int kTokens = 8 * kBlocks;
    // A slot is half a group: codes, scales (with the second half only), activations.
    static constexpr int kRowBytes = kGroup + 16;
    static constexpr int kTokensAt = kHalfBytes + kScaleBytes;
    static constexpr int kSlotBytes = kTokensAt + kTokens * kRowBytes;
    static constexpr int kRingBytes = kSlots * kSlotBytes;
    static constexpr int kFragments = 4 * kBlocks;  // of a warp's sums: float4 per lane
    static_assert(4 * kBlocks * 512 <= kSlotBytes, "a warp's sums fit the slot just consumed");
};

// One warp's half groups in order. Everything but the step from segment to segment is an addition.
template <class T, bool kGrouped>
struct Stream {
    const Problem& p;
    const int lane, warp_n, warp_k;
    Segment segment;
    int groups_left;  // of this warp in the segment; 0 at the end of the run
    int half;
    u32 tile;          // the packed tile of the next half group
    const u8* tokens;  // this lane's 16 bytes of it, first row
    int rows_left;     // rows from this lane's first to the last token

    __device__ __forceinline__ Stream(const Problem& problem, int lane_, int warp)
        : p(problem), lane(lane_), warp_n(warp % T::kWarpsN), warp_k(warp / T::kWarpsN),
          segment(Segment::first<T::kWarpsN>(problem)), half(0) {
        seek();
    }

    __device__ __forceinline__ bool more() const { return groups_left > 0; }

    // To the first group of this warp in the segment, or in a later one if it has none in this.
    __device__ __forceinline__ void seek() {
        while (true) {
            const int groups = segment.end - segment.begin - warp_k;
            groups_left = groups > 0 && segment.tile_n + warp_n < p.tiles_n ? (groups + T::kWarpsK - 1) / T::kWarpsK : 0;
            if (groups_left > 0) break;
            if (segment.left == 0) return;
            segment.template next<T::kWarpsN>(p);
        }
        const int group = segment.begin + warp_k;
        tile = (segment.tile_n + warp_n) * p.groups + group;
        const int token = segment.token_tile * T::kTokens + lane / 8;
        tokens = p.x + (static_cast<u64>(token) * p.groups + group) * (kGroup * 2) + lane % 8 * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void advance() {
        tokens += kGroup;
        half ^= 1;
        if (half == 0) {
            tokens += (T::kWarpsK - 1) * (kGroup * 2);
            tile += T::kWarpsK;
            if (--groups_left == 0 && segment.left > 0) {
                segment.template next<T::kWarpsN>(p);
                seek();
            }
        }
    }

    // Two KB of codes: 64 bytes per lane. The scales of a group come with its second half, when they are used.
    __device__ __forceinline__ void load_weights(u32 slot) const {
        const u8* const codes = p.codes + static_cast<u64>(tile * 2 + half) * kHalfBytes + lane * 16;
#pragma unroll
        for (int q = 0; q < 4; ++q) copy_async(slot + q * 512 + lane * 16, codes + q * 512);
        if constexpr (kGrouped)
            if (half == 1 && lane < kScaleBytes / 16)
                copy_async(slot + kHalfBytes + lane * 16, p.scales + static_cast<u64>(tile) * kScaleBytes + lane * 16);
    }

    // Eight lanes per row. Rows past the last token are neither loaded nor cleared: their columns of the product are never
    // stored.
    __device__ __forceinline__ void load_tokens(u32 slot) const {
        const u32 to = slot + T::kTokensAt + lane / 8 * T::kRowBytes + lane % 8 * 16;
        const u64 stride = static_cast<u64>(p.groups) * (kGroup * 2);
#pragma unroll
        for (int row = 0; row < T::kTokens; row += 4)
            if (row < rows_left) copy_async(to + row * T::kRowBytes, tokens + row * stride);
    }
};

template <class T, class E, bool kGrouped>
struct Warp {
    struct Shared {
        u32 scratch[kWarps];  // where each warp leaves its sums
    };

    const Problem& p;
    Shared& shared;
    const int warp, lane, warp_n, warp_k;
    const u8* const memory;  // the rings of all warps
    const u32 ring;          // the shared address of this warp's
    Stream<T, kGrouped> loading;
    u32 slot = 0;  // byte offset in the ring of the next half group
    float sums[T::kFragments][4];

    __device__ __forceinline__ Warp(const Problem& problem, const u8* rings, Shared& shared_)
        : p(problem), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_k(warp / T::kWarpsN), memory(rings), ring(shared_address(rings) + warp * T::kRingBytes),
          loading(problem, lane, warp) {}

    __device__ __forceinline__ void run() {
        const bool clustered = p.split > 1;
        if (clustered) cluster_arrive(false);  // this block has started, its memory may be written
        fill();
        Segment at = Segment::first<T::kWarpsN>(p);
        while (true) {
            clear(sums);
            const bool has_outputs = at.tile_n + warp_n < p.tiles_n, takes_part = has_outputs && at.begin + warp_k < at.end;
            if (takes_part)
                for (int group = at.begin + warp_k; group < at.end; group += T::kWarpsK)
                    multiply_group(group + T::kWarpsK >= at.end);
            if constexpr (T::kWarpsK > 1) sum_over_warps(at, takes_part);
            if (takes_part) {
                refill();
                next_slot();
            }
            bool finished = takes_part && warp_k == 0;
            if (clustered) {
                sum_over_cluster(finished);
                finished = finished && blockIdx.x % p.split == 0;
            } else if (finished && !at.whole(p)) {
                finished = sum_over_blocks(p, at, blockIdx.x, warp_n, T::kWarpsN, lane, sums);
            }
            if (finished) store<E, kGrouped, T::kBlocks>(p, at.tile_n + warp_n, at.token_tile * T::kTokens, lane, sums);
            if (at.left == 0) break;
            at.template next<T::kWarpsN>(p);
        }
        if (clustered) cluster_wait();
    }

    // Weights do not depend on the previous kernel: the ring fills with them while that one finishes. They are part of the
    // first commit group of the activations, since groups complete in order.
    __device__ __forceinline__ void fill() {
        Stream<T, kGrouped> tokens = loading;
#pragma unroll 1
        for (int s = 0; s < T::kSlots && loading.more(); ++s) {
            loading.load_weights(ring + s * T::kSlotBytes);
            loading.advance();
        }
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (int s = 0; s < T::kSlots; ++s) {
            if (tokens.more()) {
                tokens.load_tokens(ring + s * T::kSlotBytes);
                tokens.advance();
            }
            copy_async_commit();
        }
    }

    // The next group of this warp. The last of a segment leaves its second slot empty: it serves as scratch first.
    __device__ __forceinline__ void multiply_group(bool last) {
        float part[T::kFragments][4];
        float (&into)[T::kFragments][4] = kGrouped ? part : sums;
        const u8* const own = memory + warp * T::kRingBytes;
        const u32 tokens = ring + T::kTokensAt + token_offset<T::kBlocks, T::kRowBytes>(lane);
        if constexpr (kGrouped) clear(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            copy_async_wait<T::kSlots - 1>();
            __syncwarp();
            multiply_half<E, T::kBlocks, T::kRowBytes>(into, own + slot, tokens + slot, lane);
            if constexpr (kGrouped)
                if (half == 1) add_scaled<T::kBlocks>(sums, part, load_scales(own + slot + kHalfBytes, lane));
            if (half == 0 || !last) {
                __syncwarp();
                refill();
                next_slot();
            }
        }
    }

    __device__ __forceinline__ void next_slot() { slot = slot + T::kSlotBytes == T::kRingBytes ? 0 : slot + T::kSlotBytes; }

    // Fills the slot just consumed. One commit group per half group, so that counting groups counts halves.
    __device__ __forceinline__ void refill() {
        if (loading.more()) {
            loading.load_weights(ring + slot);
            loading.load_tokens(ring + slot);
            loading.advance();
        }
        copy_async_commit();
    }

    // The sums of the warps that split the inputs meet in the first of them, in a fixed order.
    __device__ __forceinline__ void sum_over_warps(const Segment& at, bool takes_part) {
        float4* const rings = reinterpret_cast<float4*>(const_cast<u8*>(memory));
        if (takes_part && warp_k > 0) {
            const u32 mine = (warp * T::kRingBytes + slot) / sizeof(float4);
            if (lane == 0) shared.scratch[warp] = mine;
            __syncwarp();  // all lanes have read what lay there
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) rings[mine + f * 32 + lane] = as_vector(sums[f]);
        }
        __syncthreads();
        if (takes_part && warp_k == 0) {
#pragma unroll
            for (int other = 1; other < T::kWarpsK; ++other) {
                if (at.begin + other >= at.end) break;
                const u32 theirs = shared.scratch[other * T::kWarpsN + warp_n];
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f) add(sums[f], rings[theirs + f * 32 + lane]);
            }
        }
        __syncthreads();
    }

    // The sums of the blocks that split the inputs meet in the first of them, in order of rank. Two phases of the cluster's
    // barrier per tile: the buffer is free, the buffer is full. Sums of block r lie at r - 1.
    __device__ __forceinline__ void sum_over_cluster(bool holds_sums) {
        const u32 rank = blockIdx.x % p.split, buffer = kWarps * T::kRingBytes;
        const auto place = [&](u32 r) { return buffer + (((r - 1) * T::kWarpsN + warp_n) * T::kFragments * 32 + lane) * 16; };
        cluster_wait();
        if (holds_sums && rank > 0) {
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f)
                store_to_first_block(shared_address(memory) + place(rank) + f * 512, sums[f]);
        }
        cluster_arrive(holds_sums && rank > 0);
        cluster_wait();
        if (holds_sums && rank == 0) {
            for (int r = 1; r < p.split; ++r)
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f)
                    add(sums[f], *reinterpret_cast<const float4*>(memory + place(r) + f * 512));
        }
        cluster_arrive(false);
    }
};

template <class T, class E, bool kGrouped>
__global__ void __launch_bounds__(kThreads, T::kResident) narrow_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 rings[];
    __shared__ typename Warp<T, E, kGrouped>::Shared shared;
    Warp<T, E, kGrouped>(p, rings, shared).run();
}
