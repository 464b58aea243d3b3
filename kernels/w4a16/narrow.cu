// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for up to 16 tokens at a time: bound by the bytes of the weights.
//
// The transposed product is computed: weights are operand A of mma.m16n8k16 (16 outputs x 16 inputs), tokens are its eight
// columns. One token therefore wastes an n8 tile, not an m16 one, and a lane owns whole output rows, so that scales can be
// applied to float32 sums: the tensor cores see the exact integers -8..7.
//
// The warps of a CTA share nothing until the end of an output tile: each streams its own packed tiles of 64 outputs x 128
// inputs through its own pipeline, so the loop has no barrier, and eight warps are in eight different places of it. README.md
// has the layout of the packed weights, the reasoning and the measurements.
#include "common/cluster.cuh"
#include "linear/epilogue.cuh"

template <int kN8_,         // n8 tiles of tokens: 8 or 16 tokens
          int kWarpsN_,     // warps side by side along the outputs, 64 each; the other 8 / kWarpsN split the inputs
          int kStages_,     // half tiles in a warp's pipeline
          int kCtasPerSm_,  // CTAs that must fit on an SM, which caps the registers
          int kScaleRows_>  // rows of scales of a packed tile
struct Narrow {
    static constexpr int kN8 = kN8_, kWarpsN = kWarpsN_, kStages = kStages_, kCtasPerSm = kCtasPerSm_;
    static constexpr int kWarpsK = kWarps / kWarpsN;
    static constexpr int kTokens = 8 * kN8;
    // A stage is half a packed tile: codes, scales (if both halves share a row, with the second only), activations.
    static constexpr int kScaleRows = kScaleRows_, kHalfScaleRows = kScaleRows > 1 ? kScaleRows / 2 : 1;
    static constexpr int kRowBytes = kHalfTokenBytes + 16;
    static constexpr int kTokensAt = kHalfBytes + kHalfScaleRows * kScaleBytes;
    static constexpr int kStageBytes = kTokensAt + kTokens * kRowBytes;
    static constexpr int kPipelineBytes = kStages * kStageBytes;
    static constexpr int kSharedBytes = kWarps * kPipelineBytes + kWarpsN * 4 * kN8 * 512;  // and where a cluster's sums meet
    static constexpr int kFragments = 4 * kN8;                                              // of a warp's sums: float4 per lane
    static_assert(4 * kN8 * 512 <= kStageBytes, "a warp's sums fit the stage just consumed");
};

// One warp's half tiles in order. Everything but the step from range to range is an addition.
template <class T, int kGroup>
struct Stream {
    const Problem& p;
    const int lane, warp_n, warp_k;
    PortableWork work;
    int steps_left;  // of this warp in the range; 0 at the end of the CTA's share
    int half;
    u32 tile;          // the packed tile of the next half
    const u8* tokens;  // this lane's 16 bytes of it, first row
    int rows_left;     // rows from this lane's first to the last token

    __device__ __forceinline__ Stream(const Problem& problem, int lane_, int warp)
        : p(problem), lane(lane_), warp_n(warp % T::kWarpsN), warp_k(warp / T::kWarpsN),
          work(PortableWork::first<T::kWarpsN>(problem)), half(0) {
        seek();
    }

    __device__ __forceinline__ bool more() const { return steps_left > 0; }

    // To the first step of this warp in the range, or in a later one if it has none in this.
    __device__ __forceinline__ void seek() {
        while (true) {
            const int steps = work.end - work.begin - warp_k;
            steps_left = steps > 0 && work.tile_n + warp_n < p.tiles_n ? (steps + T::kWarpsK - 1) / T::kWarpsK : 0;
            if (steps_left > 0) break;
            if (work.left == 0) return;
            work.template next<T::kWarpsN>(p);
        }
        const int step = work.begin + warp_k;
        tile = (work.tile_n + warp_n) * p.tiles_k + step;
        const int token = work.token_tile * T::kTokens + lane / 8;
        tokens = p.x + (static_cast<u64>(token) * p.tiles_k + step) * kTokenBytes + lane % 8 * 16;
        rows_left = p.m - token;
    }

    __device__ __forceinline__ void advance() {
        tokens += kHalfTokenBytes;
        half ^= 1;
        if (half == 0) {
            tokens += (T::kWarpsK - 1) * kTokenBytes;
            tile += T::kWarpsK;
            if (--steps_left == 0 && work.left > 0) {
                work.template next<T::kWarpsN>(p);
                seek();
            }
        }
    }

    // Two KB of codes: 64 bytes per lane. Scales come with the half at whose end they are used.
    __device__ __forceinline__ void load_weights(u32 stage) const {
        const u8* const codes = p.codes + static_cast<u64>(tile * 2 + half) * kHalfBytes + lane * 16;
#pragma unroll
        for (int q = 0; q < 4; ++q) copy_async(stage + q * 512 + lane * 16, codes + q * 512);
        if constexpr (kGroup == kTileColumns) {
            if (half == 1 && lane < kScaleBytes / 16)
                copy_async(stage + kHalfBytes + lane * 16, p.scales + static_cast<u64>(tile) * kScaleBytes + lane * 16);
        } else if constexpr (kGroup > 0) {
            constexpr int kBytes = T::kHalfScaleRows * kScaleBytes;
            if (lane < kBytes / 16)
                copy_async(stage + kHalfBytes + lane * 16, p.scales + static_cast<u64>(tile * 2 + half) * kBytes + lane * 16);
        }
    }

    // Eight lanes per row. Rows past the last token are neither loaded nor cleared: their columns of the product are never
    // stored.
    __device__ __forceinline__ void load_tokens(u32 stage) const {
        const u32 to = stage + T::kTokensAt + lane / 8 * T::kRowBytes + lane % 8 * 16;
        const u64 stride = static_cast<u64>(p.tiles_k) * kTokenBytes;
#pragma unroll
        for (int row = 0; row < T::kTokens; row += 4)
            if (row < rows_left) copy_async(to + row * T::kRowBytes, tokens + row * stride);
    }
};

template <class T, class E, int kGroup>
struct Warp {
    struct Shared {
        u32 scratch[kWarps];  // where each warp leaves its sums
    };

    const Problem& p;
    Shared& shared;
    const int warp, lane, warp_n, warp_k;
    const u8* const memory;  // the pipelines of all warps
    const u32 pipeline;      // the shared address of this warp's
    Stream<T, kGroup> loading;
    u32 stage = 0;  // byte offset in the pipeline of the next half tile
    float sums[T::kFragments][4];

    __device__ __forceinline__ Warp(const Problem& problem, const u8* pipelines, Shared& shared_)
        : p(problem), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_n(warp % T::kWarpsN),
          warp_k(warp / T::kWarpsN), memory(pipelines), pipeline(shared_address(pipelines) + warp * T::kPipelineBytes),
          loading(problem, lane, warp) {}

    __device__ __forceinline__ void run() {
        const bool clustered = p.split > 1;
        if (clustered) cluster_arrive(false);  // this CTA has started, its memory may be written
        fill();
        PortableWork at = PortableWork::first<T::kWarpsN>(p);
        while (true) {
            clear(sums);
            const bool has_outputs = at.tile_n + warp_n < p.tiles_n, takes_part = has_outputs && at.begin + warp_k < at.end;
            if (takes_part)
                for (int step = at.begin + warp_k; step < at.end; step += T::kWarpsK)
                    multiply_tile(step + T::kWarpsK >= at.end);
            if constexpr (T::kWarpsK > 1) reduce_over_warps(at, takes_part);
            if (takes_part) {
                refill();
                next_stage();
            }
            bool finished = takes_part && warp_k == 0;
            if (clustered) {
                reduce_over_cluster(finished);
                finished = finished && blockIdx.x % p.split == 0;
            } else if (finished && !at.whole(p)) {
                finished = reduce_over_ctas(p, at, blockIdx.x, warp_n, T::kWarpsN, lane, sums);
            }
            if (finished) store<E, kGroup, T::kN8>(p, at.tile_n + warp_n, at.token_tile * T::kTokens, lane, sums);
            if (at.left == 0) break;
            at.template next<T::kWarpsN>(p);
        }
        if (clustered) cluster_wait();
    }

    // Weights do not depend on the previous kernel: the pipeline fills with them while that one finishes. They are part of the
    // first commit group of the activations, since groups complete in order.
    __device__ __forceinline__ void fill() {
        Stream<T, kGroup> tokens = loading;
#pragma unroll 1
        for (int s = 0; s < T::kStages && loading.more(); ++s) {
            loading.load_weights(pipeline + s * T::kStageBytes);
            loading.advance();
        }
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (int s = 0; s < T::kStages; ++s) {
            if (tokens.more()) {
                tokens.load_tokens(pipeline + s * T::kStageBytes);
                tokens.advance();
            }
            copy_async_commit();
        }
    }

    // The next packed tile of this warp. The last of a range leaves its second stage empty: it serves as scratch first.
    __device__ __forceinline__ void multiply_tile(bool last) {
        float part[T::kFragments][4];
        const u8* const own = memory + warp * T::kPipelineBytes;
        const u32 tokens = pipeline + T::kTokensAt + token_offset<T::kN8, T::kRowBytes>(lane);
        if constexpr (kGroup == kTileColumns) clear(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            copy_async_wait<T::kStages - 1>();
            __syncwarp();
            const u8* const scales = own + stage + kHalfBytes;
            if constexpr (kNarrowGroups<kGroup>) {
                multiply_groups<E, kGroup, T::kN8, T::kRowBytes>(sums, own + stage, scales, tokens + stage, lane);
            } else {
                float (&into)[T::kFragments][4] = kGroup > 0 ? part : sums;
                multiply_half<E, T::kN8, T::kRowBytes>(into, own + stage, tokens + stage, lane);
                if constexpr (kGroup > 0)
                    if (half == 1) add_scaled<T::kN8>(sums, part, load_scales(scales, lane));
            }
            if (half == 0 || !last) {
                __syncwarp();
                refill();
                next_stage();
            }
        }
    }

    __device__ __forceinline__ void next_stage() {
        stage = stage + T::kStageBytes == T::kPipelineBytes ? 0 : stage + T::kStageBytes;
    }

    // Fills the stage just consumed. One commit group per half tile, so that counting groups counts halves.
    __device__ __forceinline__ void refill() {
        if (loading.more()) {
            loading.load_weights(pipeline + stage);
            loading.load_tokens(pipeline + stage);
            loading.advance();
        }
        copy_async_commit();
    }

    // The sums of the warps that split the inputs meet in the first of them, in a fixed order.
    __device__ __forceinline__ void reduce_over_warps(const PortableWork& at, bool takes_part) {
        float4* const pipelines = reinterpret_cast<float4*>(const_cast<u8*>(memory));
        if (takes_part && warp_k > 0) {
            const u32 mine = (warp * T::kPipelineBytes + stage) / sizeof(float4);
            if (lane == 0) shared.scratch[warp] = mine;
            __syncwarp();  // all lanes have read what lay there
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) pipelines[mine + f * 32 + lane] = as_vector(sums[f]);
        }
        __syncthreads();
        if (takes_part && warp_k == 0) {
#pragma unroll
            for (int other = 1; other < T::kWarpsK; ++other) {
                if (at.begin + other >= at.end) break;
                const u32 theirs = shared.scratch[other * T::kWarpsN + warp_n];
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f) add(sums[f], pipelines[theirs + f * 32 + lane]);
            }
        }
        __syncthreads();
    }

    // The sums of the CTAs that split the inputs meet in the first of them, in order of rank. Two phases of the cluster's
    // barrier per tile: the buffer is free, the buffer is full. Sums of CTA r lie at r - 1.
    __device__ __forceinline__ void reduce_over_cluster(bool holds_sums) {
        const u32 rank = blockIdx.x % p.split, buffer = kWarps * T::kPipelineBytes;
        const auto place = [&](u32 r) { return buffer + (((r - 1) * T::kWarpsN + warp_n) * T::kFragments * 32 + lane) * 16; };
        cluster_wait();
        if (holds_sums && rank > 0) {
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f) store_to_first_cta(shared_address(memory) + place(rank) + f * 512, sums[f]);
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

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(kThreads, T::kCtasPerSm) narrow_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 pipelines[];
    __shared__ typename Warp<T, E, kGroup>::Shared shared;
    Warp<T, E, kGroup>(p, pipelines, shared).run();
}
