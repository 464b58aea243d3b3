// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, on Hopper.
//
// The transposed product: weights are operand A of wgmma, dequantised into registers, tokens are its n dimension and come from
// shared memory. One thread of a warpgroup of its own issues copies, the others multiply. Each of these owns its outputs
// from the first product to the store, so the only thing that they share is the ring, and they drift apart: while
// one dequantises, scales or stores, the tensor cores work for the other.
//
// Scales are applied to float32 sums, every 128 inputs: the tensor cores see the exact integers -8..7. That costs a second set
// of sums and half an instruction per token, output and group, where scaling the weights would cost a rounding.
#include "w4a16/hopper.cuh"

template <int kTokens, int kWarpgroups, int kTiles, int kSlots, int kResident>
using Hopper = HopperTile<kTokens, kWarpgroups, kTiles, kSlots, kResident, kTileBytes>;

template <class T, class E, bool kGrouped>
struct Multiplier : HopperWarp<T> {
    using Warp = HopperWarp<T>;
    using Warp::p, Warp::memory, Warp::warp, Warp::lane, Warp::tile, Warp::fragment, Warp::place, Warp::sums;
    using Warp::Warp;

    // A batch is so many k16 steps. While the tensor cores work on up to kBuffers - 1 batches, the next is converted.
    static constexpr int kSteps = T::kTokens > 64 ? 1 : T::kTokens == 64 ? 2 : 4, kBatches = 8 / kSteps;
    static constexpr int kBuffers = T::kTokens < 64 ? 2 : 4;

    float part[T::kFragments][4];  // of one packed tile and group
    u32 a[kBuffers][kSteps][4];    // weights of as many batches
    Vec16 codes[2];                // of the two halves of a group

    __device__ __forceinline__ void begin() {
        load(0, 0);
        convert(0, 0, 0);
    }

    // One group. While a batch of products runs, the weights of the next are converted, at the end those of the next slot.
    __device__ __forceinline__ void multiply(bool more) {
        const u32 shared = shared_address(memory), slot = place.slot;
        const u64 tokens = swizzled_descriptor(shared + slot * T::kSlotBytes);
        place.advance();
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            u32 scales;
            if constexpr (kGrouped) scales = Warp::load_scales(slot, r);
            if constexpr (T::kTurns) warpgroups_wait(1 + warp / 4);
#pragma unroll
            for (int batch = 0; batch < kBatches; ++batch) {
                issue(kGrouped ? part : sums[r], batch, tokens);
                if (T::kTurns && batch + 1 == kBatches) {
                    const bool last = !more && r + 1 == T::kTiles && warp / 4 + 1 == T::kWarpgroups;
                    warpgroups_arrive_if(!last, 1 + (warp / 4 + 1) % T::kWarpgroups);
                }
                warpgroup_wait<kBuffers - 1>();  // the registers of the next batch are free
                if (batch + 1 < kBatches) {
                    convert(slot, r, batch + 1);
                } else if (r + 1 < T::kTiles) {
                    convert(slot, r + 1, 0);
                } else {
                    barrier_wait_if(more, T::full(shared, place.slot), place.parity);
                    load(place.slot, 0);
                    convert(place.slot, 0, 0);
                }
            }
            warpgroup_wait<0>();
            if constexpr (kGrouped) Warp::collect(sums[r], part, scales);
        }
        if (lane == 0) barrier_arrive(T::empty(shared, slot));
    }

    __device__ __forceinline__ void issue(float (&into)[T::kFragments][4], int batch, u64 tokens) {
        warpgroup_fence();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int step = batch * kSteps + j;
            Warpgroup<E, T::kTokens>::multiply(into, a[batch % kBuffers][j],
                                               tokens + (step / 4 * T::kBoxBytes + step % 4 * 32) / 16,
                                               !kGrouped || step > 0);
        }
        warpgroup_commit();
    }

    // The codes of a group: eight k16 steps of this warp's fragment.
    __device__ __forceinline__ void load(u32 slot, int r) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            codes[half] = *reinterpret_cast<const Vec16*>(memory + slot * T::kSlotBytes + T::kCodesAt + tile * kTileBytes +
                                                          half * (kTileBytes / 2) + (fragment + r) * 512 + lane * 16);
    }

    // The weights of a batch; loads the codes of the slot's next packed tile when these are used up.
    __device__ __forceinline__ void convert(u32 slot, int r, int batch) {
        const int step = batch * kSteps;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) E::dequantize(codes[step / 4].word[step % 4 + j], a[batch % kBuffers][j]);
        if (batch + 1 == kBatches && r + 1 < T::kTiles) load(slot, r + 1);
    }

    struct Outputs {
        int n;
        float scale[Warp::kOutputs], bias[Warp::kOutputs];

        __device__ __forceinline__ Outputs(const HopperProblem& p, int tile_n, int fragment, int lane)
            : n(tile_n * kTileRows + lane / 4 * 8 + fragment * 2) {
#pragma unroll
            for (int o = 0; o < Warp::kOutputs; ++o) {
                scale[o] = kGrouped ? 1.f : half_to_float(reinterpret_cast<const u16*>(p.scales)[n + o]);
                bias[o] = p.bias != nullptr && n + o < p.n ? E::widen(p.bias[n + o]) : 0.f;
            }
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int r) const {
            return E::round_pair(low * scale[2 * r] + bias[2 * r], high * scale[2 * r + 1] + bias[2 * r + 1]);
        }
    };

    __device__ __forceinline__ void finish(const Stretch& at) {
        if (p.split > 1) {
            Warp::template sum_over_cluster<Outputs>(at);
            return;
        }
        if (!Warp::complete(at)) return;
        const int tile_n = T::first_packed_tile(p, at) + tile, first_token = at.token_tile(p) * T::kTokens;
        if (tile_n >= p.tiles_n) return;
        const Outputs outputs(p, tile_n, fragment, lane);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) Warp::store_fragment(outputs, f, first_token);
    }
};
