// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, for up to 8 tokens at a time: `linear/strip.cuh` with dense weights.
#include "linear/strip.cuh"

// Two of the four fragments of a packed tile, as one lane has them.
struct DenseStrip {
    static constexpr int kSteps = 8;  // products of 16 inputs
    Vec16 word[2][2];                 // [half][fragment], a word for each step

    struct Place {
        const u8* begin;

        __device__ __forceinline__ void seek(const u8* tile, int part, int lane) { begin = tile + part * 1024 + lane * 16; }
    };

    __device__ __forceinline__ void load(const Place& from) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int f = 0; f < 2; ++f) word[half][f] = load_once(from.begin + half * kHalfBytes + f * 512);
    }

    template <class E>
    __device__ __forceinline__ void multiply(float (&into)[4], int f, int step, const u32 (&b)[2][4]) const {
        u32 a[4];
        E::dequantize(word[step / 4][f].word[step % 4], a);
        E::Operand::multiply(into, a, b[step / 2 % 2][step % 2 * 2], b[step / 2 % 2][step % 2 * 2 + 1]);
    }
};

template <int kDepth, int kScaleRows>
struct Strip : StripShape<kDepth, kScaleRows> {
    using Codes = DenseStrip;
    static constexpr int kPackedBytes = kTileBytes;
};
