// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, x rounded to e4m3 with a scale for each token, on Hopper.
//
// The transposed product of w4a16/hopper.cu on the same packed weights, with tensor cores of 8 bits: twice the rate for half
// the energy. A word of a packed tile, one lane's codes of 16 inputs, is half of its e4m3 fragment of 32 inputs: even nibbles
// are one row, odd nibbles the other. In a row the inputs then are in the order in which `round.cu` writes the activations.
//
// Tensor cores see the exact integers -8..7. They add e4m3 products with few bits, so every packed tile, 128 inputs, has sums of
// its own, which are scaled in float32 and added up. Meanwhile products of the next one run, or of the other warpgroup.
#include "linear/hopper.cuh"

template <int kTokens, int kConsumers, int kStages>
using Fp8 = HopperTile<kTokens, kConsumers, 1, kStages, 1, kTileBytes, 1, false, 1>;

template <class T, class E, int kGroup>
struct Consumer : ConsumerWarp<T> {
    using Warp = ConsumerWarp<T>;
    using Warp::p, Warp::memory, Warp::warp, Warp::lane, Warp::tile, Warp::fragment, Warp::state, Warp::sums;
    using Warp::Warp;

    // Up to 128 tokens two packed tiles are multiplied in one go: the sums of one are scaled while the products of the other run.
    static constexpr bool kPairs = T::kTokens <= 128;
    // A batch is so many k32 steps. While the tensor cores work on one, the next is converted.
    static constexpr int kSteps = 1, kBatches = 4 / kSteps, kBuffers = 2;

    float part[kPairs ? 2 : 1][T::kFragments][4];  // of a packed tile each
    u32 a[kBuffers][kSteps][4];                    // weights of as many batches
    Vec16 codes[2];                                // of the two halves of a packed tile

    __device__ __forceinline__ void begin() {
        load(state.stage);
        convert(0);
    }

    __device__ __forceinline__ void multiply(bool more) { multiply_stages<1>(more); }
    __device__ __forceinline__ void multiply_pair(bool more) { multiply_stages<2>(more); }

    template <int kCount>
    __device__ __forceinline__ void multiply_stages(bool more) {
        u32 stage[2], scales[2];
        products<0>(more || kCount > 1, stage, scales);
        if constexpr (kCount > 1) products<1>(more, stage, scales);
        hold();
        warpgroup_wait<0>();
        finish(part[kCount - 1], stage[kCount - 1], scales[kCount - 1]);
    }

    // One stage. While a batch of products runs, the weights of the next are converted, at the end those of the next stage.
    template <int kIndex>
    __device__ __forceinline__ void products(bool more, u32 (&stage)[2], u32 (&scales)[2]) {
        const u32 shared = shared_address(memory);
        const u64 tokens = swizzled_descriptor(shared + state.stage * T::kStageBytes);
        stage[kIndex] = state.stage;
        scales[kIndex] = kGroup > 0 ? Warp::load_scales(state.stage, 0) : kOnes;
        state.advance();
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
            issue(part[kIndex], batch, tokens);
            warpgroup_wait<1>();  // the registers of the next batch are free
            if (batch + 1 == kBatches) {
                barrier_wait_if(more, T::full(shared, state.stage), state.phase);
                load(state.stage);
            }
            if (kIndex > 0 && batch == 1) finish(part[0], stage[0], scales[0]);
            convert((batch + 1) % kBatches);
        }
    }

    // The sums of a stage are there, and its memory is free.
    __device__ __forceinline__ void finish(float (&from)[T::kFragments][4], u32 stage, u32 scales) {
        __syncwarp();  // all lanes have read the stage
        barrier_arrive_if(lane == 0, T::empty(shared_address(memory), stage));
        Warp::collect(sums[0], from, scales);
    }

    // Keeps conversions before the wait.
    __device__ __forceinline__ void hold() {
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[0][j][e])::"memory");
    }

    __device__ __forceinline__ void issue(float (&into)[T::kFragments][4], int batch, u64 tokens) {
        warpgroup_fence();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int step = batch * kSteps + j;
            Warpgroup<E4m3, T::kTokens>::multiply(into, a[batch % kBuffers][j], tokens + step * 32 / 16, step > 0);
        }
        warpgroup_commit();
    }

    __device__ __forceinline__ void load(u32 stage) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            codes[half] = *reinterpret_cast<const Vec16*>(memory + stage * T::kStageBytes + T::kCodesAt + tile * kTileBytes +
                                                          half * kHalfBytes + fragment * 512 + lane * 16);
    }

    // The weights of a batch.
    __device__ __forceinline__ void convert(int batch) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int step = batch * kSteps + j;
            const Vec16& half = codes[step / 2];
            u32(&to)[4] = a[batch % kBuffers][j];
            E4m3::dequantize<E::Grid::kZero>(half.word[step % 2 * 2], to[0], to[1]);
            E4m3::dequantize<E::Grid::kZero>(half.word[step % 2 * 2 + 1], to[2], to[3]);
        }
    }

    struct Outputs {
        int n;
        float scale[2], bias[2];

        __device__ __forceinline__ Outputs(const HopperProblem& p, int tile_n, int fragment, int lane)
            : n(tile_n * kTileRows + lane / 4 * 8 + fragment * 2) {
#pragma unroll
            for (int o = 0; o < 2; ++o) {
                scale[o] = kGroup > 0 ? 1.f : half_to_float(reinterpret_cast<const u16*>(p.scales)[n + o]);
                bias[o] = p.bias != nullptr && n + o < p.n ? E::Output::widen(p.bias[n + o]) : 0.f;
            }
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int) const {
            return E::Output::round_pair(low * scale[0] + bias[0], high * scale[1] + bias[1]);
        }
    };

    // Sums that other CTAs add to theirs are those of the activations before these were rounded, too.
    __device__ __forceinline__ void scale_tokens(int first_token) {
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = first_token + f * 8 + lane % 4 * 2 + e;
                const float scale = token < p.m ? p.token_scales[token] / E4m3::kQuantum : 0.f;
                sums[0][f][e] *= scale;
                sums[0][f][2 + e] *= scale;
            }
    }

    __device__ __forceinline__ void epilogue(const HopperWork& at) {
        const int tile_n = T::first_packed_tile(p, at) + tile, first_token = at.token_tile(p) * T::kTokens;
        scale_tokens(first_token);
        if (p.split > 1) {
            Warp::template reduce_over_cluster<Outputs>(at);
            return;
        }
        const bool whole = at.whole(p);
        if (!whole && !Warp::complete(at)) return;
        if (tile_n >= p.tiles_n) return;
        const Outputs outputs(p, tile_n, fragment, lane);
        if (whole) {
            store_together(outputs, tile_n, first_token);
            return;
        }
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) Warp::store_fragment(outputs, f, first_token);
    }

    // A warp has four bytes of each 16 that belong to a token. The warpgroup puts them together in shared memory, and then writes
    // 128 bytes at a time.
    __device__ __forceinline__ void store_together(const Outputs& outputs, int tile_n, int first_token) {
        u8* const turned = memory + T::kOutputsAt + tile * T::kTileOutputBytes;
        const int thread = threadIdx.x % 128, n = tile_n * kTileRows + thread % 8 * 8;
        warpgroup_sync();  // what was there has been read
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                *reinterpret_cast<u32*>(turned + (f * 8 + lane % 4 * 2 + e) * 128 + lane / 4 * 16 + fragment * 4) =
                    outputs.round(sums[0][f][e], sums[0][f][2 + e], 0);
        warpgroup_sync();
#pragma unroll 4
        for (int row = thread / 8; row < T::kTokens; row += 16) {
            const int token = first_token + row;
            if (token >= p.m) break;
            const Vec16 v = *reinterpret_cast<const Vec16*>(turned + row * 128 + thread % 8 * 16);
            u8* const to = p.y + (static_cast<u64>(token) * p.n + n) * 2;
            if (p.n % 8 == 0) {
                if (n < p.n) *reinterpret_cast<Vec16*>(to) = v;
            } else {
#pragma unroll
                for (int o = 0; o < 8; ++o)
                    if (n + o < p.n) reinterpret_cast<u16*>(to)[o] = static_cast<u16>(v.word[o / 2] >> (o % 2 * 16));
            }
        }
    }

    __device__ __forceinline__ void warpgroup_sync() {
        asm volatile("bar.sync %0, 128;" ::"r"(1 + tile) : "memory");  // 0 and 15 are for the CTA
    }

    static constexpr u32 kOnes = 0x3C003C00;  // two float16
};
