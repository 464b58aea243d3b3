// 2:4-sparse weights: what one packed tile holds, and one warp's product with half of it.
//
// Of every four neighbouring inputs two codes are kept, with their two positions. A tile of 64 outputs x 128 inputs is two
// halves of 64 inputs, each 1 KB of kept codes and 512 bytes of positions. A word of codes is one lane's A fragment of
// mma.sp.m16n8k32, eight kept codes, in the nibble order of the dense kernels. A word of positions serves two such products:
// with sparsity selector s, the hardware reads them from lanes 2 s and 2 s + 1 of each four.
#pragma once

#include "linear/multiply.cuh"

constexpr int kKeptBytes = 1024;               // codes of a half
constexpr int kSparseHalf = kKeptBytes + 512;  // and positions
constexpr int kSparseTile = 2 * kSparseHalf;

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

template <class E>
struct SparseProduct;

#define SPARSE_PRODUCT(ELEMENT, TYPE)                                                                                         \
    template <>                                                                                                               \
    struct SparseProduct<ELEMENT> {                                                                                           \
        template <int kSelector>                                                                                              \
        __device__ __forceinline__ static void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 positions) { \
            asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, "         \
                "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                                           \
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions),     \
                  "n"(kSelector));                                                                                            \
        }                                                                                                                     \
    };

SPARSE_PRODUCT(Half, "f16")
SPARSE_PRODUCT(Bfloat16, "bf16")
#undef SPARSE_PRODUCT

// Two k32 steps. `half` is half a packed tile, `tokens` the shared address of the tokens' 64 inputs plus `token_offset<1>`.
template <class E, int kN8, int kRowBytes>
__device__ __forceinline__ void multiply_sparse_half(float (&sums)[4 * kN8][4], const u8* half, u32 tokens, int lane) {
    const Vec16* const own = reinterpret_cast<const Vec16*>(half) + lane;
    const Vec16 q[2] = {own[0], own[32]}, positions = own[64];  // q[m16 tile / 2].word[m16 tile % 2 * 2 + step]
    const auto step = [&](auto selector) {
        constexpr int kStep = decltype(selector)::value;
        u32 b[kN8][4];
#pragma unroll
        for (int n = 0; n < kN8; ++n) load_matrices(b[n], tokens + n * 8 * kRowBytes + kStep * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 a[4];
            E::dequantize(q[i / 2].word[i % 2 * 2 + kStep], a);
#pragma unroll
            for (int n = 0; n < kN8; ++n)
                SparseProduct<typename E::Operand>::template multiply<kStep>(sums[i * kN8 + n], a, b[n], positions.word[i]);
        }
    };
    step(Constant<0>{});
    step(Constant<1>{});
}
