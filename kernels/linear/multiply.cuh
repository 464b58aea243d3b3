// Shared memory to tensor cores: 64 outputs x 64 inputs of packed weights times up to 32 tokens.
#pragma once

#include "common/element.cuh"
#include "linear/problem.cuh"

// One warp's sums of 64 outputs x (8 kN8) tokens, float[4 * kN8][4]: fragment i * kN8 + b belongs to m16 tile i and
// n8 tile b. Lane 4 g + t holds, of tokens 8 b + 2 t and the next, outputs 8 g + 2 i (elements 0, 1) and 8 g + 2 i + 1
// (elements 2, 3).
template <int kFragments>
__device__ __forceinline__ void clear(float (&sums)[kFragments][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[f][e] = 0.f;
}

// This lane's place in the first token row and k16 step that it supplies to ldmatrix, in rows kRowBytes apart. (16 bytes more
// than a multiple of 128, so that eight rows fall into different banks.)
template <int kN8, int kRowBytes>
__device__ __forceinline__ u32 token_offset(int lane) {
    static_assert(kRowBytes % 128 == 16, "conflict-free rows");
    const int row = kN8 == 1 ? lane % 8 : lane % 8 + lane / 16 * 8;
    const int unit = kN8 == 1 ? lane / 8 : lane / 8 % 2;
    return row * kRowBytes + unit * 16;
}

// Four k16 steps. `codes` is half a packed tile, `tokens` the shared address of the tokens' 64 inputs plus `token_offset`.
template <class E, int kN8, int kRowBytes>
__device__ __forceinline__ void multiply_half(float (&sums)[4 * kN8][4], const u8* codes, u32 tokens, int lane) {
    Vec16 q[4];  // [m16 tile], one word per k16 step
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = reinterpret_cast<const Vec16*>(codes)[i * 32 + lane];
    u32 b[kN8][2];
    [[maybe_unused]] u32 two_steps[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if constexpr (kN8 == 1) {  // one n8 tile: four matrices serve two steps
            if (j % 2 == 0) load_matrices(two_steps, tokens + j * 32);
            b[0][0] = two_steps[j % 2 * 2];
            b[0][1] = two_steps[j % 2 * 2 + 1];
        } else {
#pragma unroll
            for (int pair = 0; pair < kN8; pair += 2) {
                u32 r[4];
                load_matrices(r, tokens + j * 32 + pair * 8 * kRowBytes);
                b[pair][0] = r[0];
                b[pair][1] = r[1];
                b[pair + 1][0] = r[2];
                b[pair + 1][1] = r[3];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 a[4];
            E::dequantize(q[i].word[j], a);
#pragma unroll
            for (int n = 0; n < kN8; ++n) E::Operand::multiply(sums[i * kN8 + n], a, b[n][0], b[n][1]);
        }
    }
}

// The scales of a lane's eight outputs, which are neighbours.
using Scales = Vec16;

__device__ __forceinline__ Scales load_scales(const u8* row, int lane) {
    return *reinterpret_cast<const Vec16*>(row + lane / 4 * 16);
}

// Adds a group's sums, scaled.
template <int kN8>
__device__ __forceinline__ void add_scaled(float (&sums)[4 * kN8][4], const float (&part)[4 * kN8][4], const Scales& scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = half_to_float(scales.word[i] & 0xFFFF), high = half_to_float(scales.word[i] >> 16);
#pragma unroll
        for (int b = 0; b < kN8; ++b)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i * kN8 + b][e] += part[i * kN8 + b][e] * (e < 2 ? low : high);
    }
}

// Which row of scales a k16 step of a packed tile has.
template <int kGroup>
constexpr int scale_row_of(int step) {
    return kGroup == 0 ? 0 : step * 16 / (kGroup == 0 ? 1 : kGroup);
}

// Whether packed tiles have several rows of scales.
template <int kGroup>
constexpr bool kNarrowGroups = 0 < kGroup && kGroup < kTileColumns;

// Four k16 steps with groups of 32 or 64 inputs, added to the sums when scaled; `scales` is this half's first row of them. One
// m16 tile after another, so that few sums are on their way at a time.
template <class E, int kGroup, int kN8, int kRowBytes>
__device__ __forceinline__ void multiply_groups(float (&sums)[4 * kN8][4], const u8* codes, const u8* scales, u32 tokens,
                                                int lane) {
    u32 b[4][kN8][2];
    if constexpr (kN8 == 1) {  // one n8 tile: four matrices serve two steps
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            u32 r[4];
            load_matrices(r, tokens + j * 32);
            b[j][0][0] = r[0];
            b[j][0][1] = r[1];
            b[j + 1][0][0] = r[2];
            b[j + 1][0][1] = r[3];
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int pair = 0; pair < kN8; pair += 2) {
                u32 r[4];
                load_matrices(r, tokens + j * 32 + pair * 8 * kRowBytes);
                b[j][pair][0] = r[0];
                b[j][pair][1] = r[1];
                b[j][pair + 1][0] = r[2];
                b[j][pair + 1][1] = r[3];
            }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (kN8 > 1 && i > 0) __syncwarp();  // registers: what the next m16 tile reads must not be read earlier
        const Vec16 q = reinterpret_cast<const Vec16*>(codes)[i * 32 + lane];
#pragma unroll
        for (int first = 0; first < 4; first += kGroup / 16) {
            float part[kN8][4];
            clear(part);
#pragma unroll
            for (int j = first; j < first + kGroup / 16; ++j) {
                u32 a[4];
                E::dequantize(q.word[j], a);
#pragma unroll
                for (int n = 0; n < kN8; ++n) E::Operand::multiply(part[n], a, b[j][n][0], b[j][n][1]);
            }
            const u32 pair =
                *reinterpret_cast<const u32*>(scales + scale_row_of<kGroup>(first) * kScaleBytes + lane / 4 * 16 + i * 4);
            const float low = half_to_float(pair & 0xFFFF), high = half_to_float(pair >> 16);
#pragma unroll
            for (int n = 0; n < kN8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i * kN8 + n][e] += part[n][e] * (e < 2 ? low : high);
        }
    }
}
