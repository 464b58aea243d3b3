// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, on Hopper.
//
// The dense Hopper kernel (w4a16/hopper.cu) with sparse products: weights are the sparse operand A of wgmma.sp, dequantised into
// registers, their positions beside them. One thread of a warpgroup of its own issues copies, the others multiply and drift apart.
//
// A group of 128 inputs is only four products of a packed tile here, so less time passes between two scalings. With few tokens
// there are two sets of sums of a group: one is scaled while the tensor cores fill the other. With many, warpgroups take turns.
#include "common/cluster.cuh"
#include "w24a16/products.cuh"
#include "w24a16/sparse.cuh"
#include "w4a16/stretch.cuh"
#include "w4a16/finish.cuh"

template <int kTokens_,      // tokens per block: 8 to 128
          int kWarpgroups_,  // warpgroups that multiply, side by side along the outputs
          int kTiles_,       // packed tiles of 64 outputs of each of them: 1, 2 or 4
          int kSlots_,       // slots of the ring, one group of 128 inputs each
          int kResident_>    // blocks that must fit on a multiprocessor
struct Hopper {
    static constexpr int kTokens = kTokens_, kWarpgroups = kWarpgroups_, kTiles = kTiles_, kSlots = kSlots_, kResident = kResident_;
    static constexpr int kMultiplyThreads = 128 * kWarpgroups, kThreads = kMultiplyThreads + 128, kWarps = 4 * kWarpgroups;
    static constexpr int kBlockTiles = kWarpgroups * kTiles;  // packed tiles of a block
    static constexpr int kFragments = kTokens / 8;            // n8 blocks: float4 of sums per lane and packed tile
    // A slot: activations in two boxes of 64 inputs, codes. Scales and barriers lie behind all slots, whose boxes stay aligned.
    static constexpr int kBoxBytes = kTokens * 128;
    static constexpr int kCodesAt = 2 * kBoxBytes;
    static constexpr int kSlotBytes = kCodesAt + kBlockTiles * kSparseTile;
    static constexpr int kScalesAt = kSlots * kSlotBytes;
    static constexpr int kSlotScaleBytes = kBlockTiles * kScaleBytes;
    static constexpr int kBarriersAt = kScalesAt + kSlots * kSlotScaleBytes;
    static constexpr int kSumsBarrierAt = kBarriersAt + kSlots * 16;
    static constexpr int kStretchesAt = kSumsBarrierAt + 16;  // one per warp that multiplies
    // Slots whose weights are asked for before the activations may be. Where the tensor cores are the limit, activations should
    // not queue behind many of them.
    static constexpr int kAhead = kTokens > 32 ? 2 : kSlots;
    // Registers per thread at the launch; then the copying warpgroup gives away most of its own to the others. (If it gave too few
    // they would wait for ever.)
    static constexpr int kRegisters = 65536 / (kThreads * kResident) / 8 * 8, kCopyRegisters = 24;
    static constexpr int kMultiplyRegisters = (kRegisters * (kWarpgroups + 1) - kCopyRegisters) / kWarpgroups / 8 * 8;
    static_assert(kMultiplyRegisters <= 248, "a thread's limit");
    static_assert(kSlotBytes % 1024 == 0, "aligned boxes");

    __device__ __forceinline__ static u32 full(u32 memory, u32 slot) { return memory + kBarriersAt + slot * 16; }
    __device__ __forceinline__ static u32 empty(u32 memory, u32 slot) { return full(memory, slot) + 8; }
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
};

// The groups of a block in order.
template <class T>
struct Cursor {
    Stretch at;
    int group;
    int first_token, tile_n;  // tile_n: first packed tile
    bool more = true;

    __device__ __forceinline__ explicit Cursor(const HopperProblem& p) : at(Stretch::first(p, blockIdx.x, gridDim.x)) { begin(p); }

    __device__ __forceinline__ void begin(const HopperProblem& p) {
        group = at.begin;
        first_token = at.token_tile(p) * T::kTokens;
        tile_n = at.output_tile(p) * T::kBlockTiles;
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
        barrier_expect(barrier, 2 * T::kBoxBytes + tiles * (kSparseTile + (kGrouped ? kScaleBytes : 0)));
        u64 tile = static_cast<u64>(at.tile_n) * p.groups + at.group;
        u32 codes = memory + slot * T::kSlotBytes + T::kCodesAt, scales = memory + T::kScalesAt + slot * T::kSlotScaleBytes;
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            copy_bulk(codes, p.codes + tile * kSparseTile, kSparseTile, barrier);
            if constexpr (kGrouped) copy_bulk(scales, p.scales + tile * kScaleBytes, kScaleBytes, barrier);
            tile += p.groups;
            codes += kSparseTile;
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

// A warpgroup's 64 kTiles outputs are 4 kTiles fragments of 16; each of its warps takes kTiles neighbours, one for each of
// its packed tiles. So a lane's 2 kTiles outputs are neighbours, too.
template <class T, class E, bool kGrouped>
struct Multiplier {
    // Two sets of sums of a group, where registers suffice.
    static constexpr bool kTwoParts = T::kTiles > 1 && T::kTokens < (T::kResident > 1 ? 32 : 64);
    // A batch is a group of a packed tile, or half of one. While the tensor cores work on one, the next is converted.
    static constexpr int kBatches = kTwoParts || T::kTiles == 4 ? 1 : 2, kHalves = 2 / kBatches;
    // Warpgroups take turns at issuing the products of a packed tile. Else the tensor cores serve all at once, at the same pace, and
    // idle while all scale their sums.
    static constexpr bool kTurns = T::kTokens >= 64 && T::kWarpgroups > 1;

    const HopperProblem& p;
    u8* const memory;
    const int warp, lane, tile, fragment;  // packed tile of the block, and this warp's first fragment of it
    Place<T> place;
    float sums[T::kTiles][T::kFragments][4];
    float part[kTwoParts ? 2 : 1][T::kFragments][4];  // of one packed tile and group
    u32 a[2][2 * kHalves][4], positions[2][kHalves];  // weights of this batch and the next: k32 steps; positions of 64 inputs each
    Vec16 codes[2];  // of two neighbouring fragments: [half of a group]
    uint2 places[2];

    __device__ __forceinline__ Multiplier(const HopperProblem& problem, u8* memory_)
        : p(problem), memory(memory_), warp(__shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0)), lane(threadIdx.x % 32), tile(warp * T::kTiles / 4),
          fragment(warp * T::kTiles % 4) {}

    __device__ __forceinline__ void run() {
        wait_for_previous_kernel();  // it may still read what will be written here
        barrier_wait(T::full(shared_address(memory), 0), 0);
        convert(0, 0);
        if (kTurns && warp / 4 + 1 == T::kWarpgroups) warpgroups_arrive_if(true, 1);  // the first begins
        // Its registers would be missed in the loop over the groups.
        Stretch& at = *reinterpret_cast<Stretch*>(memory + T::kStretchesAt + warp * sizeof(Stretch));
        for (at = Stretch::first(p, blockIdx.x, gridDim.x);; at.next(p, gridDim.x)) {
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) clear(sums[r]);
            const bool more = at.more(p);
#pragma unroll 1
            for (int left = at.end - at.begin; left > 0; --left) multiply(left > 1 || more);
            if constexpr (!kGrouped) {
                warpgroup_wait<0>();
#pragma unroll
                for (int r = 0; r < T::kTiles; ++r) sums_are_ready(sums[r]);
            }
            finish(at);
            if (!more) return;
        }
    }

    // One group.
    __device__ __forceinline__ void multiply(bool more) {
        const u32 slot = place.slot;
        const u64 tokens = swizzled_descriptor(shared_address(memory) + slot * T::kSlotBytes);
        place.advance();
        if constexpr (kTwoParts) {
            multiply_ahead(slot, tokens, more);
        } else {
            multiply_by_turns(slot, tokens, more);
        }
        if (lane == 0) barrier_arrive(T::empty(shared_address(memory), slot));
    }

    // While the tensor cores are at a packed tile, the one before is added up and the next is converted.
    __device__ __forceinline__ void multiply_ahead(u32 slot, u64 tokens, bool more) {
        u32 scales[2];
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            issue(kGrouped ? part[r % 2] : sums[r], r, tokens);
            if constexpr (kGrouped) scales[r % 2] = load_scales(slot, r);
            warpgroup_wait<1>();  // the tile before: its sums are there, its registers free
            hold(r + 1);
            if (kGrouped && r > 0) collect(sums[r - 1], part[(r + 1) % 2], scales[(r + 1) % 2]);
            prepare(slot, r, more);
        }
        warpgroup_wait<0>();
        hold(T::kTiles - 1);
        if constexpr (kGrouped) collect(sums[T::kTiles - 1], part[(T::kTiles - 1) % 2], scales[(T::kTiles - 1) % 2]);
    }

    // While one warpgroup's products run, the other adds up.
    __device__ __forceinline__ void multiply_by_turns(u32 slot, u64 tokens, bool more) {
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            u32 scales = 0;
            if constexpr (kGrouped) scales = load_scales(slot, r);
            if constexpr (kTurns) warpgroups_wait(1 + warp / 4);
#pragma unroll
            for (int batch = 0; batch < kBatches; ++batch) {
                const int number = r * kBatches + batch;
                issue(kGrouped ? part[0] : sums[r], number, tokens);
                if (kTurns && batch + 1 == kBatches) {
                    const bool last = !more && r + 1 == T::kTiles && warp / 4 + 1 == T::kWarpgroups;
                    warpgroups_arrive_if(!last, 1 + (warp / 4 + 1) % T::kWarpgroups);
                }
                warpgroup_wait<1>();  // the registers of the next batch are free
                hold(number + 1);
                prepare(slot, number, more);
            }
            warpgroup_wait<0>();
            if constexpr (kGrouped) collect(sums[r], part[0], scales);
        }
    }

    // Converts the batch after number `number` of a slot, which may be the next slot's first.
    __device__ __forceinline__ void prepare(u32 slot, int number, bool more) {
        if (number + 1 < T::kTiles * kBatches) {
            convert(slot, number + 1);
        } else {
            barrier_wait_if(more, T::full(shared_address(memory), place.slot), place.parity);
            convert(place.slot, 0);
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
        using Product = SparseWarpgroup<E, T::kTokens>;
        const int buffer = number % 2, first = number % kBatches * kHalves;
        hold(number);
        warpgroup_fence();
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const u64 box = tokens + (first + half) * (T::kBoxBytes / 16);
            Product::template multiply<0>(into, a[buffer][2 * half], box, positions[buffer][half], !kGrouped || first + half > 0);
            Product::template multiply<1>(into, a[buffer][2 * half + 1], box + 64 / 16, positions[buffer][half], true);
        }
        warpgroup_commit();
    }

    // Neighbouring fragments' codes and positions are read together.
    __device__ __forceinline__ void convert(u32 slot, int number) {
        const int buffer = number % 2, r = number / kBatches, first = number % kBatches * kHalves;
        const u8* const at = memory + slot * T::kSlotBytes + T::kCodesAt + tile * kSparseTile + lane * 16;
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

    // Of this lane's two outputs in packed tile `r`.
    __device__ __forceinline__ u32 load_scales(u32 slot, int r) const {
        return *reinterpret_cast<const u32*>(memory + T::kScalesAt + slot * T::kSlotScaleBytes + tile * kScaleBytes + lane / 4 * 16 +
                                             (fragment + r) * 4);
    }

    __device__ __forceinline__ void collect(float (&into)[T::kFragments][4], float (&from)[T::kFragments][4], u32 scales) {
        sums_are_ready(from);
        const float low = half_to_float(scales & 0xFFFF), high = half_to_float(scales >> 16);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 4; ++e) into[f][e] += from[f][e] * (e < 2 ? low : high);
    }

    __device__ __forceinline__ void finish(const Stretch& at) {
        if (p.split > 1) {
            sum_over_cluster(at);
            return;
        }
        const int tile_n = at.output_tile(p) * T::kBlockTiles + tile, first_token = at.token_tile(p) * T::kTokens;
        if (tile_n >= p.tiles_n) return;
        auto& flat = reinterpret_cast<float(&)[T::kTiles * T::kFragments][4]>(sums);
        if (!at.whole(p) && !sum_over_blocks(p, at, blockIdx.x, warp, T::kWarps, lane, flat)) return;
        const Outputs outputs(p, tile_n, fragment, lane);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) {
            float v[T::kTiles][4];
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r)
#pragma unroll
                for (int e = 0; e < 4; ++e) v[r][e] = sums[r][f][e];
            outputs.store(p, first_token + f * 8 + lane % 4 * 2, v);
        }
    }

    // Every block of the cluster sums and stores its share of the n8 blocks. The rings are done with: sums arrive there.
    __device__ __forceinline__ void sum_over_cluster(const Stretch& at) {
        const u32 rank = blockIdx.x % p.split;
        const int share = (T::kFragments + p.split - 1) / p.split;
        const auto place_of = [&](int source, int local, int r) {
            return static_cast<u32>((((source * share + local) * T::kTiles + r) * T::kWarps + warp) * 512 + lane * 16);
        };
        const u32 shared = shared_address(memory), arrived = shared + T::kSumsBarrierAt;
        const int first = rank * share, mine = T::kFragments - first < share ? T::kFragments - first : share;
        if (threadIdx.x == 0) barrier_expect(arrived, (mine > 0 ? mine : 0) * p.split * T::kTiles * T::kWarps * 512);
        cluster_arrive(false);  // this block reads its ring no longer
        cluster_wait();
        u32 owner = 0;
        int local = 0;
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) {
            const u32 there = address_in_block(shared, owner);
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) send_to_block(there + place_of(rank, local, r), sums[r][f], there + T::kSumsBarrierAt);
            if (++local == share) {
                local = 0;
                ++owner;
            }
        }
        barrier_wait(arrived, 0);
        const int tile_n = at.output_tile(p) * T::kBlockTiles + tile, first_token = at.token_tile(p) * T::kTokens;
        if (tile_n >= p.tiles_n) return;
        const Outputs outputs(p, tile_n, fragment, lane);
#pragma unroll 1
        for (int f = first; f < first + mine; ++f) {
            float v[T::kTiles][4];
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r)
#pragma unroll
                for (int e = 0; e < 4; ++e) v[r][e] = 0.f;
#pragma unroll 4
            for (int source = 0; source < p.split; ++source)
#pragma unroll
                for (int r = 0; r < T::kTiles; ++r) add(v[r], *reinterpret_cast<const float4*>(memory + place_of(source, f - first, r)));
            outputs.store(p, first_token + f * 8 + lane % 4 * 2, v);
        }
    }

    // This lane's neighbouring outputs: what they are scaled by and where they go.
    struct Outputs {
        static constexpr int kCount = 2 * T::kTiles;
        int n;
        u32 scale[T::kTiles], bias[T::kTiles];  // pairs of 16 bits

        __device__ __forceinline__ Outputs(const HopperProblem& p, int tile_n, int fragment, int lane)
            : n(tile_n * kTileRows + lane / 4 * 8 + fragment * 2) {
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) {
                if constexpr (!kGrouped) scale[r] = *reinterpret_cast<const u32*>(p.scales + (n + 2 * r) * 2);
                bias[r] = 0;
                if (p.bias != nullptr) {
                    if (n + 2 * r < p.n) bias[r] = p.bias[n + 2 * r];
                    if (n + 2 * r + 1 < p.n) bias[r] |= static_cast<u32>(p.bias[n + 2 * r + 1]) << 16;
                }
            }
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int r) const {
            if constexpr (!kGrouped) {
                low *= half_to_float(scale[r] & 0xFFFF);
                high *= half_to_float(scale[r] >> 16);
            }
            return E::round_pair(low + E::widen(bias[r] & 0xFFFF), high + E::widen(bias[r] >> 16));
        }

        // Tokens `token` and the next of one n8 block.
        __device__ __forceinline__ void store(const HopperProblem& p, int token, const float (&v)[T::kTiles][4]) const {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (token + e >= p.m) continue;
                u32 pairs[T::kTiles];
#pragma unroll
                for (int r = 0; r < T::kTiles; ++r) pairs[r] = round(v[r][e], v[r][2 + e], r);
                u8* const to = p.y + (static_cast<u64>(token + e) * p.n + n) * 2;
                if (p.n % kCount == 0) {
                    if (n < p.n) store_together(to, pairs);
                } else {
#pragma unroll
                    for (int o = 0; o < kCount; ++o)
                        if (n + o < p.n) reinterpret_cast<u16*>(to)[o] = static_cast<u16>(pairs[o / 2] >> (o % 2 * 16));
                }
            }
        }

        __device__ __forceinline__ static void store_together(u8* to, const u32 (&pairs)[T::kTiles]) {
            if constexpr (T::kTiles == 1) {
                *reinterpret_cast<u32*>(to) = pairs[0];
            } else if constexpr (T::kTiles == 2) {
                *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
            } else {
                *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    };
};

template <class T, class E, bool kGrouped>
__global__ void __launch_bounds__(T::kThreads, T::kResident) hopper_kernel(const __grid_constant__ HopperProblem p) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    if (threadIdx.x == T::kMultiplyThreads) {
        prefetch_map(p.x);
        barrier_init(shared + T::kSumsBarrierAt, 1);
        for (u32 slot = 0; slot < T::kSlots; ++slot) {
            barrier_init(T::full(shared, slot), 1);
            barrier_init(T::empty(shared, slot), T::kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= T::kMultiplyThreads) {
        release_registers<T::kCopyRegisters>();
        if (threadIdx.x == T::kMultiplyThreads) Copier<T, kGrouped>{p, shared}.run();
    } else {
        claim_registers<T::kMultiplyRegisters>();
        Multiplier<T, E, kGrouped>(p, memory).run();
    }
}
