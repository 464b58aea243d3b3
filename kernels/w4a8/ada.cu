// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, x rounded to e4m3 with a scale for each token, by mma.sync: on Ada.
//
// The pipeline is that of w4a16/wide.cu, the numbers are those of w4a8/hopper.cu: the same packed weights, tokens in the order
// in which `round.cu` writes them, sums of one packed tile, 128 inputs, scaled in float32 and added up. Two words of a packed
// tile, 16 inputs each, are an A fragment of m16n8k32. Its sums lie where those of m16n8k16 do, so the end of a tile is shared.
#include "linear/wide.cuh"

template <int kN8, int kWarpsN, int kWarpsT, int kStages>
using Ada = Wide<kN8, kWarpsN, kWarpsT, 1, 1, kStages, 1, E4m3::kBytes>;

template <class T, class E, int kGroup>
struct Block : WideBlock<T> {
    using Warp = WideBlock<T>;
    using Warp::p, Warp::lane, Warp::warp_n, Warp::warp_t, Warp::sums;
    using Warp::Warp;

    static constexpr int kHeld = 2;  // m16 tiles that each read of tokens serves
    static_assert(T::kN8 % 2 == 0, "tokens are read by 16");

    // This warp's 64 outputs x 128 inputs.
    __device__ __forceinline__ void multiply(const u8* stage, int) {
        const u8* const codes = stage + warp_n * kTileBytes;
        const u8* const scales = stage + T::kScalesAt + warp_n * kScaleBytes + lane / 4 * 16;
        const u32 tokens = shared_address(stage) + T::kTokensAt + warp_t * T::kN8 * 8 * T::kRowBytes +
                           T::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int first = 0; first < 4; first += kHeld) {
            float part[kHeld][T::kN8][4];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) clear(part[i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                multiply_half(part, codes + half * kHalfBytes + first * 512, tokens ^ half * 64);
                __syncwarp();  // registers: what the next half reads must not be read earlier
            }
#pragma unroll
            for (int i = 0; i < kHeld; ++i) collect(first + i, part[i], scales);
        }
    }

    // Two k32 steps. `tokens` is this lane's row of the first one, in which the units of the second are two further on.
    __device__ __forceinline__ void multiply_half(float (&part)[kHeld][T::kN8][4], const u8* codes, u32 tokens) const {
        Vec16 q[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) q[i] = reinterpret_cast<const Vec16*>(codes)[i * 32 + lane];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            u32 a[kHeld][4];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) convert(q[i], step * 2, a[i]);
#pragma unroll
            for (int pair = 0; pair < T::kN8; pair += 2) {
                u32 b[4];  // 16 tokens
                load_matrices(b, (tokens ^ step * 32) + pair * 8 * T::kRowBytes);
#pragma unroll
                for (int i = 0; i < kHeld; ++i) {
                    E::Operand::multiply(part[i][pair], a[i], b[0], b[1]);
                    E::Operand::multiply(part[i][pair + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Two words of one m16 tile: a row has the even nibbles, the row 8 below the odd ones.
    __device__ __forceinline__ static void convert(const Vec16& q, int word, u32 (&a)[4]) {
        E4m3::dequantize<E::Grid::kZero>(q.word[word], a[0], a[1]);
        E4m3::dequantize<E::Grid::kZero>(q.word[word + 1], a[2], a[3]);
    }

    // Adds the sums of one packed tile and m16 tile, times this lane's scales of it.
    __device__ __forceinline__ void collect(int i, const float (&part)[T::kN8][4], const u8* scales) {
        float low = 1.f, high = 1.f;
        if constexpr (kGroup > 0) {
            const u32 pair = reinterpret_cast<const u32*>(scales)[i];
            low = half_to_float(pair & 0xFFFF);
            high = half_to_float(pair >> 16);
        }
#pragma unroll
        for (int b = 0; b < T::kN8; ++b)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i * T::kN8 + b][e] += part[b][e] * (e < 2 ? low : high);
    }

    __device__ __forceinline__ void epilogue(const PortableWork& work) {
        if (!Warp::complete(work)) return;
        const int first_token = Warp::first_token(work);
        scale(first_token);
        store<E, kGroup, T::kN8>(p, work.tile_n + warp_n, first_token, lane, sums);
    }

    // By tokens. Those past the last one have no scale and are not stored.
    __device__ __forceinline__ void scale(int first_token) {
#pragma unroll
        for (int b = 0; b < T::kN8; ++b)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = first_token + b * 8 + lane % 4 * 2 + e;
                if (token >= p.m) continue;
                const float scale = p.token_scales[token];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[i * T::kN8 + b][e] *= scale;
                    sums[i * T::kN8 + b][2 + e] *= scale;
                }
            }
    }
};

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(kThreads, 1) ada_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 pipeline[];
    Block<T, E, kGroup> block(p, pipeline);
    run(block);
}
