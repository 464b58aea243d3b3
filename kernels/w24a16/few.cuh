// Up to 32 tokens: scales are applied to sums, in float32, so weights are exact.
//
// A group of 128 inputs is only four products of a packed tile, so there are two sets of sums of a group: one is scaled while
// the tensor cores fill the other.
#pragma once

#include "w24a16/outputs.cuh"

template <class T, class E, int kGroup>
struct FewTokens : SparseConsumer<T, E, kGroup> {
    using Warp = ConsumerWarp<T>;
    using Warp::memory, Warp::lane, Warp::tile, Warp::fragment, Warp::state, Warp::sums;
    using SparseConsumer<T, E, kGroup>::SparseConsumer;

    // Two sets where registers suffice. Else a group goes in halves, of which one is converted while the other runs.
    static constexpr bool kTwoParts = T::kTiles > 1 && (T::kTokens < 32 || T::kCtasPerSm == 1);
    // A batch is a group of a packed tile, or half of one. While the tensor cores work on one, the next is converted.
    static constexpr int kBatches = kTwoParts ? 1 : 2, kHalves = 2 / kBatches;

    float part[kTwoParts ? 2 : 1][T::kFragments][4];  // of one packed tile and group
    u32 a[2][2 * kHalves][4];                         // weights of this batch and the next: k32 steps
    u32 positions[2][kHalves];                        // of theirs, 64 inputs each
    Vec16 codes[2];                                   // of two neighbouring fragments: [half of a group]
    uint2 places[2];

    __device__ __forceinline__ void begin() { convert(0, 0); }

    // One stage.
    __device__ __forceinline__ void multiply(bool more) {
        const u32 stage = state.stage;
        const u64 tokens = swizzled_descriptor(shared_address(memory) + stage * T::kStageBytes);
        state.advance();
        if constexpr (kTwoParts) {
            multiply_ahead(stage, tokens, more);
        } else {
            multiply_in_halves(stage, tokens, more);
        }
        __syncwarp();  // all lanes have read the stage
        if (lane == 0) barrier_arrive(T::empty(shared_address(memory), stage));
    }

    // While the tensor cores are at a packed tile, the one before is added up and the next is converted.
    __device__ __forceinline__ void multiply_ahead(u32 stage, u64 tokens, bool more) {
        u32 scales[2];
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            issue(kGroup > 0 ? part[r % 2] : sums[r], r, tokens);
            if constexpr (kGroup > 0) scales[r % 2] = Warp::load_scales(stage, r);
            warpgroup_wait<1>();  // the tile before: its sums are there, its registers free
            hold(r + 1);
            if (kGroup > 0 && r > 0) Warp::collect(sums[r - 1], part[(r + 1) % 2], scales[(r + 1) % 2]);
            prepare(stage, r, more);
        }
        warpgroup_wait<0>();
        hold(T::kTiles - 1);
        if constexpr (kGroup > 0) Warp::collect(sums[T::kTiles - 1], part[(T::kTiles - 1) % 2], scales[(T::kTiles - 1) % 2]);
    }

    // A packed tile's sums are added up before the next one's products begin.
    __device__ __forceinline__ void multiply_in_halves(u32 stage, u64 tokens, bool more) {
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            u32 scales = 0;
            if constexpr (kGroup > 0) scales = Warp::load_scales(stage, r);
#pragma unroll
            for (int batch = 0; batch < kBatches; ++batch) {
                const int number = r * kBatches + batch;
                issue(kGroup > 0 ? part[0] : sums[r], number, tokens);
                warpgroup_wait<1>();  // the registers of the next batch are free
                hold(number + 1);
                prepare(stage, number, more);
            }
            warpgroup_wait<0>();
            if constexpr (kGroup > 0) Warp::collect(sums[r], part[0], scales);
        }
    }

    // Converts the batch after number `number` of a stage, which may be the next stage's first.
    __device__ __forceinline__ void prepare(u32 stage, int number, bool more) {
        if (number + 1 < T::kTiles * kBatches) {
            convert(stage, number + 1);
        } else {
            barrier_wait_if(more, T::full(shared_address(memory), state.stage), state.phase);
            convert(state.stage, 0);
        }
    }

    // Keeps changes of a batch's registers on this side.
    __device__ __forceinline__ void hold(int number) {
        const int buffer = number % 2;
#pragma unroll
        for (int step = 0; step < 2 * kHalves; ++step)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[buffer][step][e])::"memory");
#pragma unroll
        for (int half = 0; half < kHalves; ++half) asm volatile("" : "+r"(positions[buffer][half])::"memory");
    }

    __device__ __forceinline__ void issue(float (&into)[T::kFragments][4], int number, u64 tokens) {
        using Product = SparseWarpgroup<typename E::Operand, T::kTokens>;
        const int buffer = number % 2, first = number % kBatches * kHalves;
        hold(number);
        warpgroup_fence();
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const u64 box = tokens + (first + half) * (T::kBoxBytes / 16);
            Product::template multiply<0>(into, a[buffer][2 * half], box, positions[buffer][half],
                                          kGroup == 0 || first + half > 0);
            Product::template multiply<1>(into, a[buffer][2 * half + 1], box + 64 / 16, positions[buffer][half], true);
        }
        warpgroup_commit();
    }

    // Neighbouring fragments' codes and positions are read together.
    __device__ __forceinline__ void convert(u32 stage, int number) {
        const int buffer = number % 2, r = number / kBatches, first = number % kBatches * kHalves;
        const u8* const at = memory + stage * T::kStageBytes + T::kCodesAt + tile * kSparseTile + lane * 16;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int h = first + half;
            const u8* const codes_at = at + h * kSparseHalf + (fragment + r) / 2 * 512;
            const u8* const places_at = at + h * kSparseHalf + kKeptBytes + (fragment + r) * 4;
            uint2 q;
            if constexpr (T::kTiles == 1) {
                q = *reinterpret_cast<const uint2*>(codes_at + fragment % 2 * 8);
                positions[buffer][half] = *reinterpret_cast<const u32*>(places_at);
            } else {
                if (r % 2 == 0) {
                    codes[h] = *reinterpret_cast<const Vec16*>(codes_at);
                    places[h] = *reinterpret_cast<const uint2*>(places_at);
                }
                q = make_uint2(codes[h].word[r % 2 * 2], codes[h].word[r % 2 * 2 + 1]);
                positions[buffer][half] = r % 2 ? places[h].y : places[h].x;
            }
            E::dequantize(q.x, a[buffer][2 * half]);
            E::dequantize(q.y, a[buffer][2 * half + 1]);
        }
    }
};
