// Shared memory of a block of the Hopper kernels, dense and sparse, and the thread that fills it.
//
// A ring of slots, one group of 128 inputs each: activations, packed tiles, their scales. Two barriers per slot tell that it is
// full and that it is empty.
#pragma once

#include "linear/stretch.cuh"

template <int kTokens_,            // tokens per block: 8 to 128
          int kWarpgroups_,        // warpgroups that multiply, side by side along the outputs
          int kTiles_,             // packed tiles of 64 outputs of each of them: 1, 2 or 4
          int kSlots_,             // slots of the ring, one group of 128 inputs each
          int kResident_,          // blocks that must fit on a multiprocessor
          int kPackedBytes_,       // of a packed tile
          bool kRounded_ = false>  // scales are applied to the weights, which rounds them to 16 bits; else to the sums
struct HopperTile {
    static constexpr int kTokens = kTokens_, kWarpgroups = kWarpgroups_, kTiles = kTiles_, kSlots = kSlots_,
                         kResident = kResident_;
    static constexpr int kPackedBytes = kPackedBytes_;
    static constexpr bool kRounded = kRounded_;
    static constexpr int kMultiplyThreads = 128 * kWarpgroups, kThreads = kMultiplyThreads + 128, kWarps = 4 * kWarpgroups;
    static constexpr int kBlockTiles = kWarpgroups * kTiles;  // packed tiles of a block
    static constexpr int kFragments = kTokens / 8;            // n8 blocks: float4 of sums per lane and packed tile
    // A slot: activations in two boxes of 64 inputs, codes. Scales and barriers lie behind all slots, whose boxes stay aligned.
    static constexpr int kBoxBytes = kTokens * 128;
    static constexpr int kCodesAt = 2 * kBoxBytes;
    static constexpr int kSlotBytes = kCodesAt + kBlockTiles * kPackedBytes;
    static constexpr int kScalesAt = kSlots * kSlotBytes;
    static constexpr int kSlotScaleBytes = kBlockTiles * kScaleBytes;
    static constexpr int kBarriersAt = kScalesAt + kSlots * kSlotScaleBytes;
    static constexpr int kSumsBarrierAt = kBarriersAt + kSlots * 16;
    static constexpr int kStretchesAt = kSumsBarrierAt + 16;  // one per warp that multiplies
    // Slots whose weights are asked for before the activations may be. Where the tensor cores are the limit, activations should
    // not queue behind many of them.
    static constexpr int kAhead = kTokens > 32 ? 2 : kSlots;
    // Registers per thread at the launch; then the copying warpgroup gives away most of its own to the others. (If it gave too
    // few they would wait for ever.)
    static constexpr int kRegisters = 65536 / (kThreads * kResident) / 8 * 8, kCopyRegisters = 24;
    static constexpr int kMultiplyRegisters = (kRegisters * (kWarpgroups + 1) - kCopyRegisters) / kWarpgroups / 8 * 8;
    // Blocks of a cluster exchange their sums by copies from shared to shared memory: faster than from registers where there
    // are many.
    static constexpr bool kStaged = kRounded && kTokens > 64;
    static_assert(kMultiplyRegisters <= 248, "a thread's limit");
    static_assert(kSlotBytes % 1024 == 0, "aligned boxes");

    __device__ __forceinline__ static u32 full(u32 memory, u32 slot) { return memory + kBarriersAt + slot * 16; }
    __device__ __forceinline__ static u32 empty(u32 memory, u32 slot) { return full(memory, slot) + 8; }

    __device__ __forceinline__ static int first_packed_tile(const HopperProblem& p, const Stretch& at) {
        return at.output_tile(p) * kBlockTiles;
    }
};

// A place in the ring: the slot, and the parity of the phase that its barriers are in.
template <class T>
struct Place {
    u32 slot = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        ++slot;
        if (slot == T::kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ u32 slot_before() const { return (slot == 0 ? T::kSlots : slot) - 1; }
};

// The groups of a block in order.
template <class T>
struct Cursor {
    Stretch at;
    int group;
    int first_token, tile_n;  // tile_n: first packed tile
    bool more = true;

    __device__ __forceinline__ explicit Cursor(const HopperProblem& p) : at(Stretch::first(p, blockIdx.x, gridDim.x)) {
        begin(p);
    }

    __device__ __forceinline__ void begin(const HopperProblem& p) {
        group = at.begin;
        first_token = at.token_tile(p) * T::kTokens;
        tile_n = T::first_packed_tile(p, at);
    }

    __device__ __forceinline__ void advance(const HopperProblem& p) {
        if (++group < at.end) return;
        more = at.more(p);
        if (!more) return;
        at.next(p, gridDim.x);
        begin(p);
    }
};

// One thread: fills slots as they become empty.
template <class T, bool kGrouped>
struct Copier {
    const HopperProblem& p;
    const u32 memory;

    __device__ __forceinline__ void run() const {
        Cursor<T> weights(p), tokens(p);
        Place<T> place;
        // Weights do not depend on the previous kernel: they come while that one finishes.
#pragma unroll 1
        for (u32 slot = 0; slot < T::kAhead && weights.more; ++slot) {
            load_weights(weights, slot);
            weights.advance(p);
        }
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (u32 slot = 0; slot < T::kSlots && tokens.more; ++slot) {
            load_tokens(tokens, slot);
            tokens.advance(p);
            if (slot + T::kAhead < T::kSlots && weights.more) {
                load_weights(weights, slot + T::kAhead);
                weights.advance(p);
            }
        }
#pragma unroll 1
        while (weights.more) {
            barrier_wait(T::empty(memory, place.slot), place.parity);
            load_weights(weights, place.slot);
            load_tokens(weights, place.slot);
            weights.advance(p);
            place.advance();
        }
    }

    // Announces all that the slot will hold. Packed tiles past the last output are left out; what the slot holds there is
    // multiplied, and never stored.
    __device__ __forceinline__ void load_weights(const Cursor<T>& at, u32 slot) const {
        const u32 barrier = T::full(memory, slot);
        const int left = p.tiles_n - at.tile_n, tiles = left < 0 ? 0 : left < T::kBlockTiles ? left : T::kBlockTiles;
        barrier_expect(barrier, 2 * T::kBoxBytes + tiles * (T::kPackedBytes + (kGrouped ? kScaleBytes : 0)));
        u64 tile = static_cast<u64>(at.tile_n) * p.groups + at.group;
        u32 codes = memory + slot * T::kSlotBytes + T::kCodesAt, scales = memory + T::kScalesAt + slot * T::kSlotScaleBytes;
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            copy_bulk(codes, p.codes + tile * T::kPackedBytes, T::kPackedBytes, barrier);
            if constexpr (kGrouped) copy_bulk(scales, p.scales + tile * kScaleBytes, kScaleBytes, barrier);
            tile += p.groups;
            codes += T::kPackedBytes;
            scales += kScaleBytes;
        }
    }

    __device__ __forceinline__ void load_tokens(const Cursor<T>& at, u32 slot) const {
        const u32 to = memory + slot * T::kSlotBytes, barrier = T::full(memory, slot);
#pragma unroll
        for (int box = 0; box < 2; ++box)
            copy_box(to + box * T::kBoxBytes, p.x, at.group * kGroup + box * 64, at.first_token, barrier);
    }
};
