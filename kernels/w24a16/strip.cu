// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, for up to 8 tokens at a time: `linear/strip.cuh`.
#include "linear/strip.cuh"
#include "w24a16/sparse.cuh"

// Two of the four fragments of a packed tile, as one lane has them.
struct SparseStrip {
    static constexpr int kSteps = 4;  // products of 32 inputs
    Vec16 kept[2];                    // [half].word[fragment * 2 + step of the half]
    u32 positions[2][2];              // [half][fragment]

    struct Place {
        const u8* begin;
        int positions;  // how far behind

        __device__ __forceinline__ void seek(const u8* tile, int part, int lane) {
            begin = tile + part * 512 + lane * 16;
            positions = kKeptBytes + part * (8 - 512);
        }
    };

    __device__ __forceinline__ void load(const Place& from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            kept[half] = load_once(from.begin + half * kSparseHalf);
            load_two(positions[half], from.begin + from.positions + half * kSparseHalf);
        }
    }

    template <class E>
    __device__ __forceinline__ void multiply(float (&into)[4], int f, int step, const u32 (&b)[2][4]) const {
        using Product = SparseProduct<typename E::Operand>;
        const int half = step / 2;
        u32 a[4];
        E::dequantize(kept[half].word[f * 2 + step % 2], a);
        if (step % 2 == 0)  // which of two sets of positions a word has is part of the instruction
            Product::template multiply<0>(into, a, b[0], positions[half][f]);
        else
            Product::template multiply<1>(into, a, b[1], positions[half][f]);
    }
};

template <int kDepth, int kScaleRows>
struct Strip : StripShape<kDepth, kScaleRows> {
    using Codes = SparseStrip;
    static constexpr int kPackedBytes = kSparseTile;
};
