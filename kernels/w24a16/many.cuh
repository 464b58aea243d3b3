// From 64 tokens on: scales are applied to the weights, each of which is rounded once (`rounded_weight` in
// ops/linear/reference.py).
//
// So nobody reads the sums before a tile is done, and no warpgroup waits for anything but its own weights: while products run,
// the weights of the next are converted. With one scale per output these are integers, and the sums are scaled at the end.
#pragma once

#include "w24a16/outputs.cuh"

template <class T, class E, int kGroup>
struct ManyTokens : SparseConsumer<T, E, kGroup> {
    using Sparse = SparseConsumer<T, E, kGroup>;
    using Warp = ConsumerWarp<T>;
    using Warp::p, Warp::memory, Warp::lane, Warp::tile, Warp::fragment, Warp::state, Warp::sums;
    using Sparse::Sparse;

    // A batch is a k32 step of a packed tile, or two: where products are short, or codes read one fragment at a time, two are
    // 2 to 5 % faster. With one buffer, a warpgroup converts the next batch when one is done, and the tensor cores work for the
    // others meanwhile; with two, while its own runs.
    static constexpr int kSteps = T::kTokens * T::kTiles == 128 ? 2 : 1, kBuffers = T::kTokens == 64 ? 1 : 2;
    // A portion is what is read at once: half a group of neighbouring fragments.
    static constexpr int kNeighbours = T::kTiles > 1 ? 2 : 1, kPairs = T::kTiles / kNeighbours;
    static constexpr int kPortion = kNeighbours * 2 / kSteps, kBatches = kPortion * 2 * kPairs;

    struct Batch {
        int number, buffer, portion, half, neighbour, r, step;

        __device__ __forceinline__ constexpr explicit Batch(int n)
            : number(n % kBatches), buffer(number % kBuffers), portion(number / kPortion), half(portion / kPairs),
              neighbour(number % kNeighbours), r(portion % kPairs * kNeighbours + neighbour),
              step(number % kPortion / kNeighbours) {}

        __device__ __forceinline__ constexpr bool begins_portion() const { return number % kPortion == 0; }
    };

    u32 a[kBuffers][kSteps][4];
    u32 codes[kNeighbours][2], scales[kNeighbours], positions[kBuffers][kNeighbours];
    bool flowing = false;  // products of the stage before may still run
    u32 own;               // where this lane's codes lie in the packed tiles of a stage

    __device__ __forceinline__ void begin() {
        own = tile * kSparseTile + fragment / 2 * 512 + lane * 16;
        asm volatile("" : "+r"(own));  // one register, not one for each sum that it is part of
        load_codes(state.stage, Batch(0));
        load_positions(state.stage, Batch(0));
        convert(Batch(0));
    }

    // One stage.
    __device__ __forceinline__ void multiply(bool more) {
        const u32 shared = shared_address(memory), stage = state.stage, before = state.stage_before();
        const u64 tokens = swizzled_descriptor(shared + stage * T::kStageBytes);
        state.advance();
#pragma unroll
        for (int number = 0; number < kBatches; ++number) {
            const Batch next(number + 1);
            const u32 next_stage = next.number == 0 ? state.stage : stage;
            issue(Batch(number), tokens);
            if (next.number == 0) barrier_wait_if(more, T::full(shared, next_stage), state.phase);
            if (next.begins_portion()) load_codes(next_stage, next);
            warpgroup_wait<kBuffers - 1>();  // the registers of the next batch are free
            hold(next);
            if (number == 0) {
                __syncwarp();  // all lanes have read the stage before
                barrier_arrive_if(flowing && lane == 0, T::empty(shared, before));
            }
            if (next.begins_portion()) load_positions(next_stage, next);
            convert(next);
        }
        flowing = true;
    }

    // Keeps changes of a batch's registers on this side.
    __device__ __forceinline__ void hold(const Batch& batch) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[batch.buffer][step][e])::"memory");
        asm volatile("" : "+r"(positions[batch.portion % kBuffers][batch.neighbour])::"memory");
    }

    __device__ __forceinline__ void issue(const Batch& batch, u64 tokens) {
        using Product = SparseWarpgroup<typename E::Operand, T::kTokens>;
        const u64 box = tokens + batch.half * (T::kBoxBytes / 16);
        u32& places = positions[batch.portion % kBuffers][batch.neighbour];
        hold(batch);
        warpgroup_fence();
        if (batch.step == 0) Product::template multiply<0>(sums[batch.r], a[batch.buffer][0], box, places, true);
        if (batch.step + kSteps == 2)
            Product::template multiply<1>(sums[batch.r], a[batch.buffer][kSteps - 1], box + 64 / 16, places, true);
        warpgroup_commit();
    }

    __device__ __forceinline__ void load_codes(u32 stage, const Batch& batch) {
        const u8* const from = memory + (stage * T::kStageBytes + T::kCodesAt + batch.half * kSparseHalf + batch.r * 256 + own);
        const u8* const factors = memory + (T::kScalesAt + stage * T::kStageScaleBytes + tile * kScaleBytes + (own / 4 & 0x70) +
                                            (fragment + batch.r) * 4);
        if constexpr (kNeighbours == 2) {
            const Vec16 q = *reinterpret_cast<const Vec16*>(from);
            codes[0][0] = q.word[0], codes[0][1] = q.word[1], codes[1][0] = q.word[2], codes[1][1] = q.word[3];
            if constexpr (kGroup > 0) {
                const uint2 both = *reinterpret_cast<const uint2*>(factors);
                scales[0] = both.x, scales[1] = both.y;
            }
        } else {
            const uint2 q = *reinterpret_cast<const uint2*>(from + fragment % 2 * 8);
            codes[0][0] = q.x, codes[0][1] = q.y;
            if constexpr (kGroup > 0) scales[0] = *reinterpret_cast<const u32*>(factors);
        }
    }

    __device__ __forceinline__ void load_positions(u32 stage, const Batch& batch) {
        const u8* const from = memory + (stage * T::kStageBytes + T::kCodesAt + batch.half * kSparseHalf + kKeptBytes + own +
                                         (fragment + batch.r) * 4 - fragment / 2 * 512);
        u32(&places)[kNeighbours] = positions[batch.portion % kBuffers];
        if constexpr (kNeighbours == 2) {
            const uint2 both = *reinterpret_cast<const uint2*>(from);
            places[0] = both.x, places[1] = both.y;
        } else {
            places[0] = *reinterpret_cast<const u32*>(from);
        }
    }

    __device__ __forceinline__ void convert(const Batch& batch) {
        typename E::Scales factors;  // made anew for every batch: there are no registers to keep them
        if constexpr (kGroup > 0) E::set(factors, scales[batch.neighbour], p.offset_per_scale);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            u32(&weights)[4] = a[batch.buffer][step];
            if constexpr (kGroup > 0) {
                E::weights(codes[batch.neighbour][batch.step + step], factors, weights);
            } else {
                E::dequantize(codes[batch.neighbour][batch.step + step], weights);
            }
        }
    }

    __device__ __forceinline__ void epilogue(const HopperWork& at) {
        __syncwarp();
        if (lane == 0) barrier_arrive(T::empty(shared_address(memory), state.stage_before()));
        flowing = false;
        Sparse::epilogue(at);
    }

    // Its registers were free for what was done at the end of a work range.
    __device__ __forceinline__ void resume() { begin(); }
};
