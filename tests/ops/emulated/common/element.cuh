// The elements of products in 8 and 16 bits, and what a warp does with them together, as the manual of PTX says it.
#pragma once
#include "common/types.cuh"
template <int kZero_, int>
struct Grid {
    static constexpr int kZero = kZero_;
};
template <class, class Operand_, class Output_, class Grid_>
struct Types {
    using Operand = Operand_;
    using Output = Output_;
    using Grid = Grid_;
    static constexpr float kQuantum = Operand::kQuantum;
    template <class Codes>
    static void dequantize(u32 q, Codes& a) { Operand::template dequantize<Grid::kZero>(q, a); }
};
inline float half_to_float(u16 h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                                      : std::ldexp(1.f * mantissa, -24);
    return h >> 15 ? -size : size;
}
constexpr u32 kNegative = 0x80008000;
const struct Decoded {
    float of[256];
    Decoded() {
        for (int v = 0; v < 256; ++v) {
            const int exponent = v >> 3 & 15, mantissa = v & 7;
            const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(1.f * mantissa, -9);
            of[v] = (v & 127) == 127 ? NAN : v >> 7 ? -size : size;
        }
    }
} e4m3;
struct Bfloat16 {
    static float widen(u16 h) {
        const u32 bits = h << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    static u32 round(float f) {
        u32 bits;
        std::memcpy(&bits, &f, 4);
        return std::isnan(f) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    static u32 round_pair(float low, float high) { return round(low) | round(high) << 16; }
};
// A word has kInputs / 8 neighbouring inputs: lane 4 g + t has those of rows g and g + 8 of A, and of column g of B.
template <int kInputs, class Value>
void multiply_fragments(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Value value) {
    constexpr int kEach = kInputs / 8, kBits = 32 / kEach;
    Warp& w = warp_of_lane();
    const int lane = threadIdx.x % 32;
    std::memcpy(w.a[lane], a, 16);
    w.b[lane][0] = b0;
    w.b[lane][1] = b1;
    sync(w.barrier);
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < kInputs; ++k) {
            const int of = k % (kInputs / 2) / kEach, half = k / (kInputs / 2), shift = k % kEach * kBits;
            c[e] += value(w.a[row % 8 * 4 + of][half * 2 + row / 8] >> shift) * value(w.b[column * 4 + of][half] >> shift);
        }
    }
    sync(w.barrier);
}
// m16n8k16: lane 4 g + t has inputs 2 t, 2 t + 1 and those 8 further, of rows g and g + 8 of A, of column g of B.
struct Half {
    static constexpr float kQuantum = 1.f;
    // Small integers: nibble p of `q` is the low and nibble p + 4 the high element of register p.
    template <int kZero>
    static void dequantize(u32 q, u32 (&a)[4]) {
        for (int p = 0; p < 4; ++p) a[p] = of(q >> 4 * p & 15, kZero) | of(q >> 4 * (p + 4) & 15, kZero) << 16;
    }
    static u32 of(int code, int zero) { return round(code - zero); }
    static float widen(u16 h) { return half_to_float(h); }
    static u32 round(float value) {
        if (std::isnan(value)) return 0x7FFF;
        int exponent;
        std::frexp(value, &exponent);
        exponent = max(exponent, -13);
        const u32 steps = static_cast<u32>(std::nearbyint(std::ldexp(std::fabs(std::fmin(std::fmax(value, -7e4f), 7e4f)), 11 - exponent)));
        const u32 size = steps >> 10 ? steps + (exponent + 13 << 10) : steps;  // 2048 steps carry into the exponent
        return (std::signbit(value) ? 0x8000 : 0) | (size < 0x7C00 ? size : 0x7C00);
    }
    static u32 round_pair(float low, float high) { return round(low) | round(high) << 16; }
    static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        multiply_fragments<16>(c, a, b0, b1, [](u32 bits) { return half_to_float(bits & 0xFFFF); });
    }
};
// To nearest, of two the even one, and the largest for what is too large: by looking.
inline u32 round_to_e4m3(float value) {
    if (std::isnan(value)) return 127;
    u32 best = 0;
    for (u32 v = 1; v < 127; ++v) {
        const double off = std::fabs(std::fabs(1.0 * value) - e4m3.of[v]),
                     least = std::fabs(std::fabs(1.0 * value) - e4m3.of[best]);
        if (off < least || (off == least && v % 2 == 0)) best = v;
    }
    return best | (std::signbit(value) ? 128 : 0);
}
inline u16 round_pair_to_e4m3(float low, float high) { return round_to_e4m3(low) | round_to_e4m3(high) << 8; }
// m16n8k32: lane 4 g + t has bytes 4 t to 4 t + 3 of each 16, of rows g and g + 8 of A, of column g of B.
struct E4m3 {
    static constexpr int kBytes = 1;
    static constexpr float kQuantum = 1.f / 512;
    template <int kZero>
    static void dequantize(u32 q, u32& even, u32& odd) {
        even = odd = 0;
        for (int nibble = 0; nibble < 8; ++nibble) {
            const int code = static_cast<int>(q >> 4 * nibble & 15) - kZero;
            (nibble % 2 ? odd : even) |= static_cast<u32>(std::abs(code) | (code < 0 ? 128 : 0)) << nibble / 2 * 8;
        }
    }
    static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        multiply_fragments<32>(c, a, b0, b1, [](u32 bits) { return e4m3.of[bits & 255]; });
    }
};
// ldmatrix: lanes 8 m to 8 m + 7 say where the rows of matrix m are, lane 4 g + t gets bytes 4 t to 4 t + 3 of row g.
inline void load_matrices(u32 (&r)[4], u32 shared) {
    Warp& w = warp_of_lane();
    const int lane = threadIdx.x % 32;
    w.address[lane] = shared;
    sync(w.barrier);
    for (int m = 0; m < 4; ++m) {
        u32 where[8] = {};  // what is read from each four banks: rows may be the same, but no others
        for (int row = 0; row < 8; ++row) {
            u32& here = where[w.address[8 * m + row] / 16 % 8];
            if ((here && here != w.address[8 * m + row] + 1) || shared % 16) fail("a matrix whose rows share banks");
            here = w.address[8 * m + row] + 1;
        }
        std::memcpy(&r[m], pipeline + w.address[8 * m + lane / 4] + lane % 4 * 4, 4);
    }
    sync(w.barrier);
}
