// What the kernels of a strip have in common: for up to 8 tokens at a time, where a product is so short that its beginning and
// its end cost as much as its bytes.
//
// A CTA has strips of 32 outputs, half a packed tile wide, and all inputs of them: nothing is added up across CTAs, and N / 32
// strips divide evenly over the SMs. Its sixteen warps take the packed tiles of a strip in turn, each by itself: weights go
// straight to registers, `kDepth` tiles ahead, activations to shared memory once, where each warp reads what it has fetched
// itself. The warps' sums meet in shared memory after the last strip, or when there is no room for those of one more.
#pragma once

#include "common/async_copy.cuh"
#include "common/cta.cuh"
#include "linear/multiply.cuh"

template <int kDepth_,      // packed tiles on their way to a warp
          int kScaleRows_>  // rows of scales of a packed tile
struct StripShape {
    static constexpr int kDepth = kDepth_, kScaleRows = kScaleRows_;
    static constexpr int kStripWarps = 16, kStripThreads = 32 * kStripWarps;
    static constexpr int kFragments = 2, kOutputs = 16 * kFragments, kPerTile = kTileRows / kOutputs;
    static constexpr int kTokens = 8;
    static constexpr int kRowBytes = kTokenBytes + 16;  // of a token's inputs of one tile: eight fall into different banks
    static constexpr int kSumFloats = 20;               // of a token's 16 sums of a fragment: four lanes, different banks
};

// The packed tiles of one warp in order: every sixteenth of a strip, strip after strip. A warp that has none of a strip, since
// its inputs are few, still takes its turn there, with nothing to load.
template <class T>
struct StripStream {
    const Problem& p;
    const int warp, turns;  // of a strip
    const bool idle;
    int step;  // along the inputs
    u32 strip;
    typename T::Codes::Place codes;  // this lane's
    const u8* scales;

    __device__ __forceinline__ StripStream(const Problem& problem, int warp_, u32 first)
        : p(problem), warp(warp_), turns((p.tiles_k - warp_ + T::kStripWarps - 1) / T::kStripWarps), idle(warp_ >= p.tiles_k),
          step(warp_), strip(first) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const int lane = threadIdx.x % 32, part = strip % T::kPerTile;  // of a packed tile
        const u64 tile = static_cast<u64>(strip / T::kPerTile) * p.tiles_k + step;
        codes.seek(p.codes + tile * T::kPackedBytes, part, lane);
        scales = p.scales + tile * T::kScaleRows * kScaleBytes + lane / 4 * 16 + part * T::kFragments * 4;
    }

    __device__ __forceinline__ void advance() {
        step += T::kStripWarps;
        codes.begin += T::kStripWarps * T::kPackedBytes;
        scales += T::kStripWarps * T::kScaleRows * kScaleBytes;
        if (step >= p.tiles_k) {
            step = warp;
            ++strip;
            seek();
        }
    }
};

template <class T, class E, int kGroup>
struct StripWarp {
    // Half a packed tile, as this lane multiplies with it.
    struct Weights {
        typename T::Codes codes;
        u32 scales[T::kScaleRows][T::kFragments];
    };

    const Problem& p;
    const int warp, lane;
    const u32 first;  // strip of this CTA
    const int strips, first_token;
    const u32 tokens;  // of this CTA
    u8* const memory;
    const int room;  // for the sums of so many strips
    StripStream<T> loading;
    const int tiles;  // that this warp loads
    int loaded = 0, step, finished = 0, waiting = 0;
    float sums[T::kFragments][4];

    __device__ __forceinline__ StripWarp(const Problem& problem, u8* memory_, int warp_, u32 cta, int token_tile)
        : p(problem), warp(warp_), lane(threadIdx.x % 32), first(p.schedule.first_step(cta)),
          strips(p.schedule.first_step(cta + 1) - first), first_token(token_tile * T::kTokens),
          tokens(p.m - first_token < T::kTokens ? p.m - first_token : T::kTokens), memory(memory_),
          room((dynamic_shared_bytes() - place(p.tiles_k)) / (kSumBytes * tokens)), loading(p, warp_, first),
          tiles(loading.idle ? 0 : strips * loading.turns), step(warp_) {}

    __device__ __forceinline__ void run() {
        Weights weights[T::kDepth];
        // Weights do not depend on the previous kernel: they are on their way while that one finishes.
#pragma unroll
        for (int d = 0; d < T::kDepth; ++d) load(weights[d]);
        wait_for_previous_kernel();
        let_next_kernel_start();
        load_tokens();
        clear(sums);
        const int turns = loading.idle ? strips : tiles;
#pragma unroll 1
        for (int turn = 0; turn < turns; turn += T::kDepth) {
#pragma unroll
            for (int d = 0; d < T::kDepth; ++d)
                if (turn + d < turns) {
                    if (turn + d < 2) wait_for_tokens(turn + d);
                    if (!loading.idle) multiply(weights[d]);
                    load(weights[d]);
                    step += T::kStripWarps;
                    if (step >= p.tiles_k) finish_strip();
                }
        }
    }

private:
    static constexpr int kSumBytes = T::kFragments * T::kStripWarps * T::kSumFloats * 4;  // of a strip, for each token

    __device__ __forceinline__ void load(Weights& into) {
        if (loaded == tiles) return;
        into.codes.load(loading.codes);
        if constexpr (kGroup > 0) {
#pragma unroll
            for (int row = 0; row < T::kScaleRows; ++row) load_two(into.scales[row], loading.scales + row * kScaleBytes);
        }
        loading.advance();
        ++loaded;
    }

    // Where the inputs of a tile are in shared memory: every token's.
    __device__ __forceinline__ u32 place(int tile) const { return tile * tokens * T::kRowBytes; }

    // This warp's tiles of all tokens, sixteen lanes for each row: the first one, then all others.
    __device__ __forceinline__ void load_tokens() const {
        const u32 to = shared_address(memory) + lane % 16 * 16;
        const u8* const from = p.x + lane % 16 * 16;
        for (int tile = warp; tile < p.tiles_k; tile += T::kStripWarps) {
            for (int row = lane / 16; row < tokens; row += 2)
                copy_async(to + place(tile) + row * T::kRowBytes,
                           from + (static_cast<u64>(first_token + row) * p.tiles_k + tile) * kTokenBytes);
            if (tile == warp) copy_async_commit();
        }
        copy_async_commit();
    }

    __device__ __forceinline__ void wait_for_tokens(int turn) const {
        if (turn == 0)
            copy_async_wait<1>();
        else
            copy_async_wait<0>();
        __syncwarp();
    }

    __device__ __forceinline__ void multiply(const Weights& weights) {
        float part[T::kFragments][4];
        if constexpr (kGroup > 0) clear(part);
        const int row = lane % 8 < tokens ? lane % 8 : tokens - 1;  // columns past the last token are never stored
        const u32 from = shared_address(memory) + place(step) + row * T::kRowBytes + lane / 8 * 16;
        constexpr int kSteps = T::Codes::kSteps, kInputs = kTileColumns / kSteps;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 b[2][4];  // 32 inputs each
            load_matrices(b[0], from + half * kHalfTokenBytes);
            load_matrices(b[1], from + half * kHalfTokenBytes + 64);
#pragma unroll
            for (int j = 0; j < kSteps / 2; ++j) {
                const int product = half * kSteps / 2 + j, inputs = (product + 1) * kInputs;
#pragma unroll
                for (int f = 0; f < T::kFragments; ++f)  // in turn: a product waits for the one before it on the same sums
                    weights.codes.template multiply<E>(kGroup > 0 ? part[f] : sums[f], f, product, b);
                if constexpr (kGroup > 0)
                    if (inputs % kGroup == 0)
#pragma unroll
                        for (int f = 0; f < T::kFragments; ++f) add_group(f, part[f], weights.scales[inputs / kGroup - 1][f]);
            }
        }
    }

    __device__ __forceinline__ void add_group(int f, float (&part)[4], u32 pair) {
        const float low = half_to_float(pair & 0xFFFF), high = half_to_float(pair >> 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            sums[f][e] += part[e] * (e < 2 ? low : high);
            part[e] = 0.f;
        }
    }

    // This warp has its sums of a strip. When there is room for no other strip's, or none follows, all warps' become outputs.
    __device__ __forceinline__ void finish_strip() {
        step = warp;
        float* const meeting = reinterpret_cast<float*>(memory + place(p.tiles_k));
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = lane % 4 * 2 + e % 2, output = lane / 4 + e / 2 * 8;
                if (token < tokens) meeting[sum_place(waiting, f, warp, token) + output] = sums[f][e];
            }
        clear(sums);
        ++finished;
        if (++waiting < room && finished < strips) return;
        meet<T::kStripThreads>();
        store(first + finished - waiting, waiting, meeting);
        waiting = 0;
        if (finished < strips) meet<T::kStripThreads>();
    }

    __device__ __forceinline__ int sum_place(int strip, int f, int of_warp, int token) const {
        return (((strip * T::kFragments + f) * T::kStripWarps + of_warp) * tokens + token) * T::kSumFloats;
    }

    // Outputs of `count` strips, those of a token and a strip by one warp: a lane adds all warps' sums of one, in their order.
    __device__ __forceinline__ void store(u32 first_strip, u32 count, const float* meeting) const {
        for (u32 i = warp; i < count * tokens; i += T::kStripWarps) {
            const u32 strip = i / tokens, token = i % tokens, at = first_strip + strip;
            // of each eight neighbours, a strip has four: two from each fragment, of different halves of it
            const int eight = lane / 4, f = lane % 4 / 2, second = lane % 2;
            const int n = at / T::kPerTile * kTileRows + eight * 8 + at % T::kPerTile * 4 + lane % 4;
            const float* const theirs = meeting + sum_place(strip, f, 0, token) + eight + second * 8;
            if (n >= p.n) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < T::kStripWarps; ++w) sum += theirs[w * tokens * T::kSumFloats];
            const float scale = kGroup > 0 ? 1.f : half_to_float(reinterpret_cast<const u16*>(p.scales)[n]);
            const float bias = p.bias != nullptr ? E::Output::widen(p.bias[n]) : 0.f;
            reinterpret_cast<u16*>(p.y)[static_cast<u64>(first_token + token) * p.n + n] =
                static_cast<u16>(E::Output::round_pair(sum * (scale / E::kQuantum) + bias, 0.f));
        }
    }
};

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(T::kStripThreads, 1) strip_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 memory[];
    StripWarp<T, E, kGroup>(p, memory, uniform_warp(), blockIdx.x % p.split, blockIdx.x / p.split).run();
}
