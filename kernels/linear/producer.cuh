// Shared memory of a CTA of the Hopper kernels, dense and sparse, and the thread that fills it.
//
// A pipeline of stages, one step along the inputs each: activations, packed tiles, their scales. Two barriers per stage tell
// that it is full and that it is empty.
#pragma once

#include "linear/hopper_work.cuh"

template <int kTokens_,            // tokens per CTA: 8 to 256
          int kConsumers_,         // warpgroups that multiply, side by side along the outputs
          int kTiles_,             // packed tiles of 64 outputs of each of them: 1, 2 or 4
          int kStages_,            // stages of the pipeline
          int kCtasPerSm_,         // CTAs that must fit on an SM
          int kPackedBytes_,       // of a packed tile
          int kScaleRows_,         // rows of scales of a packed tile
          bool kRounded_ = false,  // scales are applied to the weights, which rounds them to 16 bits; else to the sums
          int kBoxes_ = 2>         // of 128 bytes per token and stage: activations have 16 bits or, with one box, 8
struct HopperTile {
    static constexpr int kTokens = kTokens_, kConsumers = kConsumers_, kTiles = kTiles_, kStages = kStages_,
                         kCtasPerSm = kCtasPerSm_;
    static constexpr int kPackedBytes = kPackedBytes_, kTileScaleBytes = kScaleRows_ * kScaleBytes;
    static constexpr bool kRounded = kRounded_;
    static constexpr int kBoxes = kBoxes_, kBoxColumns = kTileColumns / kBoxes;
    static constexpr int kConsumerThreads = 128 * kConsumers, kThreads = kConsumerThreads + 128,
                         kConsumerWarps = 4 * kConsumers;
    static constexpr int kCtaTiles = kConsumers * kTiles;  // packed tiles of a CTA
    static constexpr int kFragments = kTokens / 8;         // n8 tiles: float4 of sums per lane and packed tile
    // A stage: activations in boxes of 128 bytes per token, codes. Scales and barriers lie behind all stages, whose boxes stay
    // aligned.
    static constexpr int kBoxBytes = kTokens * 128;
    static constexpr int kCodesAt = kBoxes * kBoxBytes;
    static constexpr int kStageBytes = kCodesAt + kCtaTiles * kPackedBytes;
    static constexpr int kScalesAt = kStages * kStageBytes;
    static constexpr int kStageScaleBytes = kCtaTiles * kTileScaleBytes;
    static constexpr int kBarriersAt = kScalesAt + kStages * kStageScaleBytes;
    static constexpr int kSumsBarrierAt = kBarriersAt + kStages * 16;
    static constexpr int kWorkAt = kSumsBarrierAt + 16;  // one per warp that multiplies
    // With activations of 8 bits, room to put outputs of 128 tokens together.
    static constexpr int kOutputsAt = kWorkAt + kConsumerWarps * sizeof(HopperWork);
    static constexpr int kTileOutputBytes = kBoxes == 1 ? kTileRows * 128 * 2 : 0;
    static constexpr int kSharedBytes = kOutputsAt + kCtaTiles * kTileOutputBytes;
    // Stages whose weights are asked for before the activations may be. Where the tensor cores are the limit, activations
    // should not queue behind many of them.
    static constexpr int kAhead = kTokens > 32 ? 2 : kStages;
    // Registers per thread at the launch; then the producer's warpgroup gives away most of its own to the consumers. (If it
    // gave too few they would wait for ever.)
    static constexpr int kRegisters = 65536 / (kThreads * kCtasPerSm) / 8 * 8, kProducerRegisters = 24;
    static constexpr int kConsumerRegisters = (kRegisters * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8;
    // CTAs of a cluster exchange their sums by copies from shared to shared memory: faster than from registers where there
    // are many.
    static constexpr bool kStaged = (kRounded || kBoxes == 1) && kTokens > 64 && kTokens <= 128;
    static_assert(kConsumerRegisters <= 248, "a thread's limit");
    static_assert(kStageBytes % 1024 == 0, "aligned boxes");

    __device__ __forceinline__ static u32 full(u32 memory, u32 stage) { return memory + kBarriersAt + stage * 16; }
    __device__ __forceinline__ static u32 empty(u32 memory, u32 stage) { return full(memory, stage) + 8; }

    __device__ __forceinline__ static int first_packed_tile(const HopperProblem& p, const HopperWork& at) {
        return at.output_tile(p) * kCtaTiles;
    }
};

// A place in the pipeline: the stage, and the parity of the phase that its barriers are in.
template <class T>
struct PipelineState {
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        ++stage;
        if (stage == T::kStages) {
            stage = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ u32 stage_before() const { return (stage == 0 ? T::kStages : stage) - 1; }
};

// The steps of a CTA in order.
template <class T>
struct StepIterator {
    HopperWork at;
    int step;
    int first_token, tile_n;  // tile_n: first packed tile
    bool more = true;

    __device__ __forceinline__ explicit StepIterator(const HopperProblem& p) : at(HopperWork::first(p, blockIdx.x, gridDim.x)) {
        begin(p);
    }

    __device__ __forceinline__ void begin(const HopperProblem& p) {
        step = at.begin;
        first_token = at.token_tile(p) * T::kTokens;
        tile_n = T::first_packed_tile(p, at);
    }

    __device__ __forceinline__ void advance(const HopperProblem& p) {
        if (++step < at.end) return;
        more = at.more(p);
        if (!more) return;
        at.next(p, gridDim.x);
        begin(p);
    }
};

// One thread: fills stages as they become empty.
template <class T, int kGroup>
struct Producer {
    const HopperProblem& p;
    const u32 memory;

    __device__ __forceinline__ void run() const {
        StepIterator<T> weights(p), tokens(p);
        PipelineState<T> state;
        // Weights do not depend on the previous kernel: they come while that one finishes.
#pragma unroll 1
        for (u32 stage = 0; stage < T::kAhead && weights.more; ++stage) {
            load_weights(weights, stage);
            weights.advance(p);
        }
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (u32 stage = 0; stage < T::kStages && tokens.more; ++stage) {
            load_tokens(tokens, stage);
            tokens.advance(p);
            if (stage + T::kAhead < T::kStages && weights.more) {
                load_weights(weights, stage + T::kAhead);
                weights.advance(p);
            }
        }
#pragma unroll 1
        while (weights.more) {
            barrier_wait(T::empty(memory, state.stage), state.phase);
            load_weights(weights, state.stage);
            load_tokens(weights, state.stage);
            weights.advance(p);
            state.advance();
        }
    }

    // Announces all that the stage will hold. Packed tiles past the last output are left out; what the stage holds there is
    // multiplied, and never stored.
    __device__ __forceinline__ void load_weights(const StepIterator<T>& at, u32 stage) const {
        const u32 barrier = T::full(memory, stage);
        const int left = p.tiles_n - at.tile_n, tiles = left < 0 ? 0 : left < T::kCtaTiles ? left : T::kCtaTiles;
        barrier_expect(barrier, T::kBoxes * T::kBoxBytes + tiles * (T::kPackedBytes + (kGroup > 0 ? T::kTileScaleBytes : 0)));
        u64 tile = static_cast<u64>(at.tile_n) * p.tiles_k + at.step;
        u32 codes = memory + stage * T::kStageBytes + T::kCodesAt, scales = memory + T::kScalesAt + stage * T::kStageScaleBytes;
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            tma_load(codes, p.codes + tile * T::kPackedBytes, T::kPackedBytes, barrier);
            if constexpr (kGroup > 0) tma_load(scales, p.scales + tile * T::kTileScaleBytes, T::kTileScaleBytes, barrier);
            tile += p.tiles_k;
            codes += T::kPackedBytes;
            scales += T::kTileScaleBytes;
        }
    }

    __device__ __forceinline__ void load_tokens(const StepIterator<T>& at, u32 stage) const {
        const u32 to = memory + stage * T::kStageBytes, barrier = T::full(memory, stage);
#pragma unroll
        for (int box = 0; box < T::kBoxes; ++box)
            tma_load_box(to + box * T::kBoxBytes, p.x, at.step * kTileColumns + box * T::kBoxColumns, at.first_token, barrier);
    }
};
