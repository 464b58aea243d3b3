// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, x rounded to e4m3 with a scale for each token, on Hopper.
//
// The transposed product of w4a16/hopper.cu on the same packed weights, with tensor cores of 8 bits: twice the rate for half
// the energy. A word of a packed tile, one lane's codes of 16 inputs, is half of its e4m3 fragment of 32 inputs: even nibbles
// are one row, odd nibbles the other. In a row the inputs then are in the order in which `round.cu` writes the activations.
//
// Tensor cores see the exact integers -8..7. Every packed tile, 128 inputs, has sums of its own, which are scaled and added up;
// meanwhile products of the other warpgroup run. All sums are float16, two tokens in a register. So one instruction scales two
// of them, 256 tokens fit beside their short sums, and products move half of the bits: at full load the clock follows the
// power that all this takes. A sum of 128 products is at most 448 * 8 * kQuantum * 128 = 896, and scales come multiplied by so
// small a power of two (`offset_per_scale`) that sums of all inputs stay finite, whatever the weights and activations are.
#include "linear/hopper.cuh"

template <int kTokens, int kConsumers, int kStages>
using Fp8 = HopperTile<kTokens, kConsumers, 1, kStages, 1, kTileBytes, 1, false, 1>;

template <class T, class E, int kGroup>
struct Consumer : ConsumerWarp<T> {
    using Warp = ConsumerWarp<T>;
    using Warp::p, Warp::memory, Warp::warp, Warp::lane, Warp::tile, Warp::fragment, Warp::state, Warp::sums;
    using Warp::Warp;

    static constexpr int kSteps = 4;  // of 32 inputs each: a packed tile

    u32 part[T::kFragments][2];   // sums of one packed tile
    u32 total[T::kFragments][2];  // scaled, and added up
    u32 a[kSteps][4];             // the weights of a packed tile
    Vec16 codes;                  // of half a packed tile

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if (step % 2 == 0) load(state.stage, step / 2);
            convert(step);
        }
    }

    // The registers of the next weights were free for what was done at the end of a work range.
    __device__ __forceinline__ void resume() { begin(); }

    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) total[f][0] = total[f][1] = 0;
    }

    // One stage. During the last products the weights of the next stage are converted, each as soon as its registers are free.
    __device__ __forceinline__ void multiply(bool more) {
        const u32 shared = shared_address(memory), stage = state.stage;
        const u64 tokens = swizzled_descriptor(shared + stage * T::kStageBytes);
        const u32 scales = kGroup > 0 ? Warp::load_scales(stage, 0) : kOnes;
        state.advance();
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Warpgroup<E4m3, T::kTokens>::multiply(part, a[step], tokens + step * 32 / 16, step > 0);
            warpgroup_commit();
        }
        barrier_wait_if(more, T::full(shared, state.stage), state.phase);
        load(state.stage, 0);
        refill<0>();
        refill<1>();
        load(state.stage, 1);
        refill<2>();
        refill<3>();
        __syncwarp();  // all lanes have read the stage
        barrier_arrive_if(lane == 0, T::empty(shared, stage));
        collect(scales);
    }

    // The weights of a step are no longer needed.
    template <int kStep>
    __device__ __forceinline__ void refill() {
        warpgroup_wait<kSteps - 1 - kStep>();
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[kStep][e])::"memory");
        convert(kStep);
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[kStep][e])::"memory");
    }

    // Adds the sums of a packed tile, scaled.
    __device__ __forceinline__ void collect(u32 scales) {
        sums_are_ready(part);
        const u32 smaller = times(scales, p.offset_per_scale), low = twice(smaller, 0x1010), high = twice(smaller, 0x3232);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) {
            add_product(total[f][0], part[f][0], low);
            add_product(total[f][1], part[f][1], high);
        }
    }

    __device__ __forceinline__ static u32 times(u32 a, u32 b) {
        u32 r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }

    __device__ __forceinline__ static u32 twice(u32 pair, u32 which) {
        u32 r;
        asm("prmt.b32 %0, %1, %1, %2;" : "=r"(r) : "r"(pair), "r"(which));
        return r;
    }

    __device__ __forceinline__ static void add_product(u32& sum, u32 a, u32 b) {
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    }

    __device__ __forceinline__ void load(u32 stage, int half) {
        codes = *reinterpret_cast<const Vec16*>(memory + stage * T::kStageBytes + T::kCodesAt + tile * kTileBytes +
                                                half * kHalfBytes + fragment * 512 + lane * 16);
    }

    __device__ __forceinline__ void convert(int step) {
        E4m3::dequantize<E::Grid::kZero>(codes.word[step % 2 * 2], a[step][0], a[step][1]);
        E4m3::dequantize<E::Grid::kZero>(codes.word[step % 2 * 2 + 1], a[step][2], a[step][3]);
    }

    // A lane's two.
    __device__ __forceinline__ static int first_output(int tile_n, int fragment, int lane) {
        return tile_n * kTileRows + lane / 4 * 8 + fragment * 2;
    }

    struct Outputs {
        int n;
        float bias[2];

        __device__ __forceinline__ Outputs(const HopperProblem& p, int tile_n, int fragment, int lane)
            : n(first_output(tile_n, fragment, lane)) {
#pragma unroll
            for (int o = 0; o < 2; ++o) bias[o] = p.bias != nullptr && n + o < p.n ? E::Output::widen(p.bias[n + o]) : 0.f;
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int) const {
            return E::Output::round_pair(low + bias[0], high + bias[1]);
        }
    };

    // To float32, scaled by tokens, and by outputs where these have one scale. Before sums of other CTAs are added.
    __device__ __forceinline__ void scale(int tile_n, int first_token) {
        const int first = first_token + lane % 4 * 2;
        const float* const scales = p.token_scales + first;
        int left = p.m - first;
        asm volatile("" : "+r"(left));  // nothing of this may be kept for the stores: registers are few
        const float growth = p.growth / E4m3::kQuantum;
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float scale = f * 8 + e < left ? scales[f * 8 + e] * growth : 0.f;
                sums[0][f][e] = half_to_float(static_cast<u16>(total[f][0] >> e * 16)) * scale;
                sums[0][f][2 + e] = half_to_float(static_cast<u16>(total[f][1] >> e * 16)) * scale;
            }
        if (kGroup > 0 || tile_n >= p.tiles_n) return;
        sums_are_ready(sums[0]);
        const u16* const outputs = reinterpret_cast<const u16*>(p.scales) + first_output(tile_n, fragment, lane);
        const float low = half_to_float(outputs[0]), high = half_to_float(outputs[1]);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[0][f][e] *= e < 2 ? low : high;
    }

    __device__ __forceinline__ void epilogue(const HopperWork& at) {
        const int tile_n = T::first_packed_tile(p, at) + tile, first_token = at.token_tile(p) * T::kTokens;
        scale(tile_n, first_token);
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

    // A warp has four bytes of each 16 that belong to a token. The warpgroup puts them together in shared memory, and then
    // writes 128 bytes at a time. Lanes that have other tokens write to other words of 16 bytes, or they would meet in a bank.
    __device__ __forceinline__ void store_together(const Outputs& outputs, int tile_n, int first_token) {
        u8* const turned = memory + T::kOutputsAt + tile * T::kTileOutputBytes;
#pragma unroll
        for (int number = 0; number < T::kTokens / kStoredTokens; ++number) {
            warpgroup_sync();  // what was there has been read
#pragma unroll
            for (int f = 0; f < kStoredFragments; ++f)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float (&v)[4] = sums[0][number * kStoredFragments + f];
                    *reinterpret_cast<u32*>(turned + (f * 8 + lane % 4 * 2 + e) * 128 + lane / 4 * 16 +
                                            (fragment ^ lane % 4) * 4) = outputs.round(v[e], v[2 + e], 0);
                }
            warpgroup_sync();
            write_rows(turned, tile_n, first_token + number * kStoredTokens);
        }
    }

    // So many tokens, 64 outputs each.
    __device__ __forceinline__ void write_rows(const u8* turned, int tile_n, int first_token) const {
        const int thread = threadIdx.x % 128, n = tile_n * kTileRows + thread % 8 * 8;
#pragma unroll 4
        for (int row = thread / 8; row < kStoredTokens; row += 16) {
            const int token = first_token + row;
            if (token >= p.m) break;
            const Vec16 v = ordered(*reinterpret_cast<const Vec16*>(turned + row * 128 + thread % 8 * 16), thread / 16 % 4);
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

    // Word `i` of what lay at `i ^ by`.
    __device__ __forceinline__ static Vec16 ordered(const Vec16& v, int by) {
        const bool odd = by % 2 != 0, high = by >= 2;
        const u32 a = odd ? v.word[1] : v.word[0], b = odd ? v.word[0] : v.word[1];
        const u32 c = odd ? v.word[3] : v.word[2], d = odd ? v.word[2] : v.word[3];
        return {high ? c : a, high ? d : b, high ? a : c, high ? b : d};
    }

    __device__ __forceinline__ void warpgroup_sync() {
        asm volatile("bar.sync %0, 128;" ::"r"(1 + tile) : "memory");  // 0 and 15 are for the CTA
    }

    static constexpr u32 kOnes = 0x3C003C00;                                         // two float16
    static constexpr int kStoredTokens = 128, kStoredFragments = kStoredTokens / 8;  // put together at once
};
