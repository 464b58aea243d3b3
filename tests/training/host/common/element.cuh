// Rounding to 16 bits on a CPU, to the nearest and of two to the even one.
#pragma once

#include "common/types.cuh"

struct Bfloat16 {
    static u32 round(float x) {
        u32 bits;
        std::memcpy(&bits, &x, 4);
        return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    static u32 round_pair(float low, float high) { return round(low) | round(high) << 16; }
};

struct Half {
    static u32 round(float x) {
        if (std::isnan(x)) return 0x7FFF;
        const float size = std::fabs(x);
        const int exponent = size < std::ldexp(1.f, -14) ? -14 : std::ilogb(size);
        const u32 sign = std::signbit(x) ? 0x8000 : 0;
        if (exponent > 15) return sign | 0x7C00;
        const u32 steps = static_cast<u32>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 2048 is the next power of two
        return sign | (exponent + 14 << 10) + steps;
    }
    static u32 round_pair(float low, float high) { return round(low) | round(high) << 16; }
};
