// Types: of activations in memory, of what tensor cores multiply, of outputs. An operand's type knows how eight 4-bit codes
// become one A fragment, as integers or times their scales, and how to multiply it; an output's type how float32 sums become
// outputs. Nothing else in the kernels depends on them. All three are the same, float16 or bfloat16, or the first two are e4m3.
//
// Codes times scales cost one operation for two weights besides the masks. A code alone in the low bits of a 16-bit float is a
// subnormal number, that many times the smallest one, without the bias that an exponent would bring along. So
//     code * factor - offset,   the factor being the scale over the smallest number, the offset the zero point times the scale,
// is (code - zero) * scale, rounded once. For factors to be finite, all weights are made smaller by a power of two that the
// sums get back.
#pragma once

#include "common/types.cuh"

// The grid that codes lie on: a value is (code - zero point) * scale.
template <int kZero_, int kLevels_>
struct Grid {
    static constexpr int kZero = kZero_, kLevels = kLevels_;
    static_assert(kLevels == 16 && 0 < kZero && kZero < kLevels, "four bits, and a code for zero");
};

template <class Activation_, class Operand_, class Output_, class Grid_>
struct Types {
    using Activation = Activation_;
    using Operand = Operand_;
    using Output = Output_;
    using Grid = Grid_;
    using Scales = typename Operand::Scales;
    static constexpr float kQuantum = Operand::kQuantum;

    // Codes as integers times kQuantum, or times their scales.
    __device__ __forceinline__ static void dequantize(u32 q, u32 (&a)[4]) { Operand::template dequantize<Grid::kZero>(q, a); }
    __device__ __forceinline__ static void weights(u32 q, const Scales& scales, u32 (&a)[4]) { Operand::weights(q, scales, a); }
    __device__ __forceinline__ static void set(Scales& scales, u32 pair, u32 offset_per_scale) {
        scales.template set<Grid::kZero>(pair, offset_per_scale);
    }
    __device__ __forceinline__ static float growth(float two_to_exponent) { return Operand::growth(two_to_exponent); }
};

// Twice n * 2^exponent, for n from 1 to 15, as a float of 16 bits with so many bits of mantissa.
template <int kMantissa>
constexpr u32 pair_of(int n, int exponent) {
    int top = 0;
    while (n >> (top + 1)) ++top;
    const int bias = (1 << (14 - kMantissa)) - 1;
    return ((bias + exponent + top) << kMantissa | ((n << (kMantissa - top)) & ((1 << kMantissa) - 1))) * 0x10001u;
}

constexpr u32 kNegative = 0x80008000;  // the signs of both

// (a & mask) | magic in one instruction.
__device__ __forceinline__ u32 plant(u32 a, u32 mask, u32 magic) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(magic));
    return r;
}

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// Two codes, planted, times the factor of one row, low or high, plus the offset of the same row. Written so that one
// instruction picks the halves of both operands by itself.
#define SCALED(TYPE, ROW, WEIGHTS, CODES)                                 \
    asm("{\n.reg .b16 low, high;\n.reg .b32 factor, offset;\n"            \
        "mov.b32 {low, high}, %2;\nmov.b32 factor, {" ROW ", " ROW "};\n" \
        "mov.b32 {low, high}, %3;\nmov.b32 offset, {" ROW ", " ROW "};\n" \
        "fma.rn." TYPE " %0, %1, factor, offset;\n}"                      \
        : "=r"(WEIGHTS)                                                   \
        : "r"(CODES), "r"(scales.factors), "r"(scales.offsets))

// Eight codes times their scales, made smaller by the type's power of two.
#define SCALED_WEIGHTS(TYPE)                                                                  \
    __device__ __forceinline__ static void weights(u32 q, const Scales& scales, u32(&a)[4]) { \
        _Pragma("unroll") for (int p = 0; p < 4; p += 2) {                                    \
            SCALED(TYPE, "low", a[p], q & 0x000F000F);                                        \
            SCALED(TYPE, "high", a[p + 1], q & 0x00F000F0);                                   \
            q >>= 8;                                                                          \
        }                                                                                     \
    }

struct Half {
    static constexpr int kBytes = 2;
    static constexpr float kQuantum = 1.f;

    // Codes 0..15 become the exact integers from -kZero on, two per register, times kQuantum. Nibble p of `q` is the low and
    // nibble p + 4 the high element of register p. 0x6400 is 1024 with a mantissa step of 1, so a code planted in its low bits
    // reads 1024 + q; planted four bits higher it reads 1024 + 16 q. The bias leaves in one exact operation. Nine instructions
    // for eight codes.
    template <int kZero>
    __device__ __forceinline__ static void dequantize(u32 q, u32 (&a)[4]) {
        constexpr u32 kMagic = 0x64006400, kSixteenth = 0x2C002C00;
        constexpr u32 kBias = kMagic + kZero * 0x10001,
                      kMinusHigh = 0xD400D400 + kZero * 0x100010;  // 1024 + zero, -(64 + zero)
#pragma unroll
        for (int p = 0; p < 4; p += 2) {
            const u32 low = plant(q, 0x000F000F, kMagic), high = plant(q, 0x00F000F0, kMagic);
            asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(a[p]) : "r"(low), "r"(kBias));
            asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a[p + 1]) : "r"(high), "r"(kSixteenth), "r"(kMinusHigh));
            q >>= 8;
        }
    }

    // Of a fragment's two rows, as `weights` needs them. The codes of the second row are planted four bits higher.
    struct Scales {
        u32 factors, offsets;

        // Both scales, and twice -kZero * 2^-exponent: `exponent_of` in ops/linear/layout.py says which exponent keeps factors
        // finite.
        template <int kZero>
        __device__ __forceinline__ void set(u32 pair, u32 offset_per_scale) {
            // 2^24 and 2^20 over the zero point, with its sign, and over 2^6: in two steps, as 2^21 is no float16
            constexpr u32 kPlanted = 0xE800F800, kRest = 0x54005400;
            static_assert(kZero == 8, "a power of two, which the factors can be divided by");
            asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(offsets) : "r"(pair), "r"(offset_per_scale));
            asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(factors) : "r"(offsets), "r"(kPlanted));
            asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(factors) : "r"(kRest));
        }
    };

    SCALED_WEIGHTS("f16x2")

    // What sums of weights are multiplied by.
    __device__ __forceinline__ static float growth(float two_to_exponent) { return two_to_exponent; }

    __device__ __forceinline__ static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    __device__ __forceinline__ static u32 round_pair(float low, float high) {
        u32 r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }

    __device__ __forceinline__ static float widen(u16 h) { return half_to_float(h); }
};

struct Bfloat16 {
    static constexpr int kBytes = 2;
    static constexpr float kQuantum = 1.f / 64;

    // As above. Seven mantissa bits leave no room for a second code, so codes are planted as subnormal numbers, which lose
    // their smallness and their bias in one operation: 2^-133 and 2^-129 times 2^127 and 2^123 are kQuantum. Nine instructions.
    template <int kZero>
    __device__ __forceinline__ static void dequantize(u32 q, u32 (&a)[4]) {
        constexpr u32 kLow = 0x7F007F00, kHigh = 0x7D007D00, kMinusZero = kNegative | pair_of<7>(kZero, -6);
#pragma unroll
        for (int p = 0; p < 4; p += 2) {
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[p]) : "r"(q & 0x000F000F), "r"(kLow), "r"(kMinusZero));
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[p + 1]) : "r"(q & 0x00F000F0), "r"(kHigh), "r"(kMinusZero));
            q >>= 8;
        }
    }

    // As above. The scales are rounded to bfloat16, as engines hold them that run a model in this type. Its range is so wide
    // that one exponent, 22, serves all of them.
    struct Scales {
        u32 factors, offsets;

        template <int kZero>
        __device__ __forceinline__ void set(u32 pair, u32) {
            constexpr u32 kPlanted = 0x75007700;  // 2^111 and 2^107
            constexpr u32 kOffset = kNegative | pair_of<7>(kZero, -22);
            const u32 rounded = Bfloat16::round_pair(half_to_float(pair & 0xFFFF), half_to_float(pair >> 16));
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(factors) : "r"(rounded), "r"(kPlanted), "r"(kNegative));
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(offsets) : "r"(rounded), "r"(kOffset), "r"(kNegative));
        }
    };

    SCALED_WEIGHTS("bf16x2")

    __device__ __forceinline__ static float growth(float) { return 4194304.f; }

    __device__ __forceinline__ static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    __device__ __forceinline__ static u32 round_pair(float low, float high) {
        u32 r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }

    __device__ __forceinline__ static float widen(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }
};

// Eight bits, for operands only. Numbers up to 15 of the smallest are 0x00 to 0x0F, of either sign: below the first binade and
// in it the steps are the same.
struct E4m3 {
    static constexpr int kBytes = 1;
    static constexpr float kQuantum = 1.f / 512;

    struct Scales {};

    // Codes 0..15 become the exact integers from -kZero on, four per register, times kQuantum: their distance from zero, and a
    // sign where the top bit of the code is clear. Even nibbles of `q` are those of one row, odd ones of the other. Eight
    // instructions for eight codes.
    template <int kZero>
    __device__ __forceinline__ static void dequantize(u32 q, u32& even, u32& odd) {
        static_assert(kZero == 8, "the top bit of a code tells its sign");
        even = with_sign(distance(q & 0x0F0F0F0F), q << 4);
        odd = with_sign(distance(q >> 4 & 0x0F0F0F0F), q);
    }

    // From Ada on; 32 inputs. Hopper has `Warpgroup` besides, at a higher rate.
    __device__ __forceinline__ static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

private:
    __device__ __forceinline__ static u32 distance(u32 codes) {
        u32 r;
        asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(codes), "r"(0x08080808), "r"(0));
        return r;
    }

    __device__ __forceinline__ static u32 with_sign(u32 distance, u32 clear_if_negative) {
        return distance | (~clear_if_negative & 0x80808080);
    }
};

// Two numbers rounded to e4m3, the low one in the low byte; what is too large becomes the largest.
__device__ __forceinline__ u16 round_pair_to_e4m3(float low, float high) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}

// Four 8x8 matrices of 16-bit elements; lane l supplies the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

#undef SCALED_WEIGHTS
#undef SCALED
