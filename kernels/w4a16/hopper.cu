// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, on Hopper.
//
// The transposed product: weights are operand A of wgmma, dequantised into registers, tokens are its n dimension and come from
// shared memory. Warp-specialized: one thread of a warpgroup of its own is the producer, the other warpgroups are consumers.
// Each of these owns its outputs from the first product to the store, so the only thing that they share is the pipeline, and
// they drift apart: while one dequantises, scales or stores, the tensor cores work for the other.
//
// For few tokens, scales are applied to float32 sums, for every group: the tensor cores see the exact integers -8..7. That
// costs a second set of sums and half an instruction per token, output and group, and the products must end before each
// scaling; with groups narrower than a packed tile there are two such sets, one for every other group. For many tokens, scales
// are applied to the weights as these are converted, which rounds them to 16 bits and costs next to nothing: products follow
// each other without a pause.
#include "linear/hopper.cuh"

template <int kTokens, int kConsumers, int kTiles, int kStages, int kCtasPerSm, int kScaleRows>
using Hopper = HopperTile<kTokens, kConsumers, kTiles, kStages, kCtasPerSm, kTileBytes, kScaleRows,
                          (kTokens >= (kScaleRows > 1 ? 32 : 64))>;  // many tokens

template <class T, class E, int kGroup>
struct Consumer : ConsumerWarp<T> {
    using Warp = ConsumerWarp<T>;
    using Warp::p, Warp::memory, Warp::warp, Warp::lane, Warp::tile, Warp::fragment, Warp::state, Warp::sums;
    using Warp::Warp;

    static constexpr bool kScalesWeights = T::kRounded && kGroup > 0;
    // Where a packed tile has several groups, each is a batch with sums of its own.
    static constexpr bool kGroupBatches = !T::kRounded && kNarrowGroups<kGroup>;
    // A batch is so many k16 steps. While the tensor cores work on one, the next is converted.
    static constexpr int kSteps = T::kRounded ? 2 : kGroupBatches ? kGroup / 16 : 4, kBatches = 8 / kSteps, kBuffers = 2;
    static constexpr int kParts = kGroupBatches ? 2 : 1, kRows = kScalesWeights ? kScaleRows<kGroup> : 1;

    float part[kParts][T::kRounded ? 1 : T::kFragments][4];  // of one packed tile and group
    u32 a[kBuffers][kSteps][4];                              // weights of as many batches
    Vec16 codes[2];                                          // of the two halves of a group
    u32 next_scales[kRows] = {};                             // of the tile whose codes were read last
    typename E::Scales scales;
    bool flowing = false;  // products of the stage before may still run

    __device__ __forceinline__ void begin() {
        load(state.stage, 0);
        convert(0);
    }

    __device__ __forceinline__ void multiply(bool more) {
        if constexpr (T::kRounded) {
            flow(more);
        } else if constexpr (kGroupBatches) {
            pause_at_stages(more);
        } else {
            pause_at_groups(more);
        }
    }

    // The registers of the next weights were free for what was done at the end of a work range.
    __device__ __forceinline__ void resume() {
        if constexpr (T::kRounded) begin();
    }

    // One stage. While a batch of products runs, the weights of the next are converted, at the end those of the next stage. The
    // stage before is done with once the first batch of this one is all that runs.
    __device__ __forceinline__ void flow(bool more) {
        const u32 shared = shared_address(memory), stage = state.stage, before = state.stage_before();
        const u64 tokens = swizzled_descriptor(shared + stage * T::kStageBytes);
        state.advance();
#pragma unroll
        for (int number = 0; number < T::kTiles * kBatches; ++number) {
            const int r = number / kBatches, batch = number % kBatches;
            hold(number);
            issue(sums[r], batch, tokens, true);
            warpgroup_wait<1>();
            hold(number + 1);
            if (number == 0) {
                __syncwarp();  // all lanes have read the stage before
                barrier_arrive_if(flowing && lane == 0, T::empty(shared, before));
            }
            convert((batch + 1) % kBatches);
            // Codes are read as soon as those of the tile before are used up, long before their own conversion.
            if (batch % 2 == 0) {
                const int half = batch / 2;
                if (r + 1 < T::kTiles) {
                    load_half(stage, r + 1, half);
                } else {
                    if (half == 0) barrier_wait_if(more, T::full(shared, state.stage), state.phase);
                    load_half(state.stage, 0, half);
                }
            }
        }
        flowing = true;
    }

    // One stage. While a batch of products runs, the weights of the next are converted, at the end those of the next stage.
    __device__ __forceinline__ void pause_at_groups(bool more) {
        const u32 shared = shared_address(memory), stage = state.stage;
        const u64 tokens = swizzled_descriptor(shared + stage * T::kStageBytes);
        state.advance();
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) {
            u32 scales;
            if constexpr (kGroup > 0) scales = Warp::load_scales(stage, r);
#pragma unroll
            for (int batch = 0; batch < kBatches; ++batch) {
                issue(kGroup > 0 ? part[0] : sums[r], batch, tokens, kGroup == 0 || batch > 0);
                warpgroup_wait<1>();  // the registers of the next batch are free
                if (batch + 1 < kBatches) {
                    convert(batch + 1);
                    if (batch + 2 == kBatches && r + 1 < T::kTiles) load(stage, r + 1);
                } else {
                    if (r + 1 == T::kTiles) {
                        barrier_wait_if(more, T::full(shared, state.stage), state.phase);
                        load(state.stage, 0);
                    }
                    convert(0);
                }
            }
            warpgroup_wait<0>();
            if constexpr (kGroup > 0) Warp::collect(sums[r], part[0], scales);
        }
        __syncwarp();  // all lanes have read the stage
        if (lane == 0) barrier_arrive(T::empty(shared, stage));
    }

    // One stage, where groups are narrower than a packed tile. While a group's products run, the sums of the one before are
    // scaled and added up, and the weights of the next are converted.
    __device__ __forceinline__ void pause_at_stages(bool more) {
        const u32 shared = shared_address(memory), stage = state.stage;
        const u64 tokens = swizzled_descriptor(shared + stage * T::kStageBytes);
        state.advance();
        u32 scales[2];
#pragma unroll
        for (int number = 0; number < T::kTiles * kBatches; ++number) {
            const int r = number / kBatches, batch = number % kBatches;
            hold(number);
            issue(part[number % 2], batch, tokens, false);
            scales[number % 2] = Warp::load_scales(stage, r, batch);
            if (batch + 1 == kBatches) {
                if (r + 1 < T::kTiles) {
                    load(stage, r + 1);
                } else {
                    barrier_wait_if(more, T::full(shared, state.stage), state.phase);
                    load(state.stage, 0);
                }
            }
            warpgroup_wait<1>();  // the group before: its sums are there, its registers free
            hold(number + 1);
            if (number > 0) Warp::collect(sums[(number - 1) / kBatches], part[(number - 1) % 2], scales[(number - 1) % 2]);
            convert((batch + 1) % kBatches);
        }
        warpgroup_wait<0>();
        Warp::collect(sums[T::kTiles - 1], part[1], scales[1]);
        __syncwarp();  // all lanes have read the stage
        if (lane == 0) barrier_arrive(T::empty(shared, stage));
    }

    // Keeps conversions on their side of the waits.
    __device__ __forceinline__ void hold(int number) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[number % kBuffers][j][e])::"memory");
    }

    // The products of a batch; the first of them adds to the sums, or replaces them.
    template <int kFragments>
    __device__ __forceinline__ void issue(float (&into)[kFragments][4], int batch, u64 tokens, bool add) {
        warpgroup_fence();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int step = batch * kSteps + j;
            Warpgroup<typename E::Operand, T::kTokens>::multiply(
                into, a[batch % kBuffers][j], tokens + (step / 4 * T::kBoxBytes + step % 4 * 32) / 16, add || j > 0);
        }
        warpgroup_commit();
    }

    // The codes of a packed tile: eight k16 steps of this warp's fragment.
    __device__ __forceinline__ void load(u32 stage, int r) {
        load_half(stage, r, 0);
        load_half(stage, r, 1);
    }

    __device__ __forceinline__ void load_half(u32 stage, int r, int half) {
        codes[half] = *reinterpret_cast<const Vec16*>(memory + stage * T::kStageBytes + T::kCodesAt + tile * kTileBytes +
                                                      half * (kTileBytes / 2) + (fragment + r) * 512 + lane * 16);
        if constexpr (kScalesWeights) {
#pragma unroll
            for (int row = 0; row < kRows; ++row)
                if (row * 2 / kRows == half) next_scales[row] = Warp::load_scales(stage, r, row);
        }
    }

    // The weights of a batch.
    __device__ __forceinline__ void convert(int batch) {
        if (kScalesWeights && batch * kRows % kBatches == 0)
            E::set(scales, next_scales[batch * kRows / kBatches], p.offset_per_scale);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int step = batch * kSteps + j;
            if constexpr (kScalesWeights) {
                E::weights(codes[step / 4].word[step % 4], scales, a[batch % kBuffers][j]);
            } else {
                E::dequantize(codes[step / 4].word[step % 4], a[batch % kBuffers][j]);
            }
        }
    }

    struct Outputs {
        const HopperProblem& p;
        int n;
        float scale[Warp::kOutputs], bias[Warp::kOutputs];

        __device__ __forceinline__ Outputs(const HopperProblem& problem, int tile_n, int fragment, int lane)
            : p(problem), n(tile_n * kTileRows + lane / 4 * 8 + fragment * 2) {
#pragma unroll
            for (int o = 0; o < Warp::kOutputs; ++o) {
                scale[o] = (kGroup > 0 ? 1.f : half_to_float(reinterpret_cast<const u16*>(p.scales)[n + o])) / E::kQuantum;
                bias[o] = p.bias != nullptr && n + o < p.n ? E::Output::widen(p.bias[n + o]) : 0.f;
            }
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int r) const {
            const float first = kScalesWeights ? E::growth(p.growth) : scale[2 * r];
            const float second = kScalesWeights ? E::growth(p.growth) : scale[2 * r + 1];
            return E::Output::round_pair(low * first + bias[2 * r], high * second + bias[2 * r + 1]);
        }
    };

    __device__ __forceinline__ void epilogue(const HopperWork& at) {
        if constexpr (T::kRounded) {
            __syncwarp();
            if (lane == 0) barrier_arrive(T::empty(shared_address(memory), state.stage_before()));
            flowing = false;
        }
        if (p.split > 1) {
            Warp::template reduce_over_cluster<Outputs>(at);
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
