// The two activation types. An element type knows how eight 4-bit codes become one A fragment, how to scale and how to multiply it,
// and how float32 sums become outputs; nothing else in the kernels depends on it.
#pragma once

#include "common/types.cuh"

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

struct Half {
    // Codes 0..15 become the exact integers -8..7, two per register. Nibble p of `q` is the low and nibble p + 4 the high
    // element of register p. 0x6400 is 1024 with a mantissa step of 1, so a code planted in its low bits reads 1024 + q;
    // planted four bits higher it reads 1024 + 16 q. The bias leaves in one exact operation. Nine instructions for eight codes.
    __device__ __forceinline__ static void dequantize(u32 q, u32 (&a)[4]) {
        constexpr u32 kMagic = 0x64006400, k1032 = 0x64086408, kSixteenth = 0x2C002C00, kMinus72 = 0xD480D480;
#pragma unroll
        for (int p = 0; p < 4; p += 2) {
            const u32 low = plant(q, 0x000F000F, kMagic), high = plant(q, 0x00F000F0, kMagic);
            asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(a[p]) : "r"(low), "r"(k1032));
            asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a[p + 1]) : "r"(high), "r"(kSixteenth), "r"(kMinus72));
            q >>= 8;
        }
    }

    // Scales of a fragment's two rows.
    struct Scales {
        u32 row[2];

        // The float16 scales of both rows.
        __device__ __forceinline__ void set(u32 pair) {
            row[0] = __byte_perm(pair, pair, 0x1010);
            row[1] = __byte_perm(pair, pair, 0x3232);
        }
    };

    // Codes times scales, rounded once. Register p is of row p % 2.
    __device__ __forceinline__ static void scale(u32 (&a)[4], const Scales& scales) {
#pragma unroll
        for (int p = 0; p < 4; ++p) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(a[p]) : "r"(scales.row[p % 2]));
    }

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
    // As above with 0x4300 = 128: seven mantissa bits leave room for a code in the low nibble only, so every pair is
    // shifted into place. Eleven instructions for eight codes.
    __device__ __forceinline__ static void dequantize(u32 q, u32 (&a)[4]) {
        constexpr u32 kMagic = 0x43004300, kOne = 0x3F803F80, kMinus136 = 0xC308C308;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 low = plant(q >> (4 * p), 0x000F000F, kMagic);
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[p]) : "r"(low), "r"(kOne), "r"(kMinus136));
        }
    }

    // A float16 scale has eleven significant bits. The first eight and the other three are a bfloat16 each.
    struct Scales {
        u32 first[2], rest[2];

        __device__ __forceinline__ void set(u32 pair) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float scale = half_to_float(pair >> (16 * row) & 0xFFFF);
                const u32 high = __float_as_uint(scale) & 0xFFFF0000;
                const u32 low = __float_as_uint(scale - __uint_as_float(high));
                first[row] = __byte_perm(high, high, 0x3232);
                rest[row] = __byte_perm(low, low, 0x3232);
            }
        }
    };

    // Codes times scales, rounded once: a code times three bits is exact, and the second operation rounds the whole product.
    __device__ __forceinline__ static void scale(u32 (&a)[4], const Scales& scales) {
        constexpr u32 kMinusZero = 0x80008000;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            u32 small;
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(small) : "r"(a[p]), "r"(scales.rest[p % 2]), "r"(kMinusZero));
            asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a[p]) : "r"(scales.first[p % 2]), "r"(small));
        }
    }

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

// Four 8x8 matrices of 16-bit elements; lane l supplies the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
