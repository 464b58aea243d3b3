// Which two of every four, and their values, inside one block of columns: coordinate descent over quads. With all other quads
// of its row as they are, each of the six pairs of a quad has a best pair of values and an exact gain, in closed form; the best
// pair is taken, and the block is walked along several times. `gradient` is (W - V) H for the columns of the block, from a
// matrix product.
//
//     c = g + v H_quad            v_P = c_P inverse(H_PP)            gain_P = c_P v_P
#include "solver/grid.cuh"

constexpr int kPairs = 6;
constexpr int kQuads = kColumns / 4;

struct ReselectArguments {
    const float* gradient;  // [N, >= width]
    const float* hessian;   // [K, K] from this block's first row and column on
    const float* inverses;  // [width / 4, 6, 4] of every pair P of a quad: inverse(H_PP) as (aa, ab, bb), and nothing
    float* values;          // [N, K] from this block's first column on, read and written
    u8* kept;               // [N, K] likewise
    float* change;          // [N, >= width] new minus old error
    long long stride;       // K
    long long gradient_stride;
    long long change_stride;
    int rows;
    int width;  // a multiple of 4
    int walks;
    float preference;  // by how much another pair must gain more than the present one, relatively
};

struct Choice {
    float value[4];
    u32 kept;
};

// The pair of columns that gains most; `wanted` is c, `inverses` those of this quad.
__device__ __forceinline__ Choice best_pair(const float (&wanted)[4], const float* inverses, u32 present, float preference) {
    constexpr int kOne[kPairs] = {0, 0, 0, 1, 1, 2}, kOther[kPairs] = {1, 2, 3, 2, 3, 3};
    Choice best = {};
    float most = 0.0f;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
        const int one = kOne[pair], other = kOther[pair];
        const float4 inverse = *reinterpret_cast<const float4*>(inverses + 4 * pair);
        const float first = inverse.x * wanted[one] + inverse.y * wanted[other];
        const float second = inverse.y * wanted[one] + inverse.z * wanted[other];
        const u32 kept = 1u << one | 1u << other;
        float gain = wanted[one] * first + wanted[other] * second;
        if (kept == present) gain += gain * preference;
        if (pair > 0 && !(gain > most)) continue;
        most = gain;
        best.kept = kept;
#pragma unroll
        for (int k = 0; k < 4; ++k) best.value[k] = k == one ? first : k == other ? second : 0.0f;
    }
    return best;
}

template <int kChunk>
__device__ __forceinline__ void reselect_chunk(float (&gradient)[kOwned], float (&value)[kOwned], u32& kept,
                                               const float* shared, const ReselectArguments& a, int lane) {
    constexpr int kFirst = 4 * kChunk;
    for (int owner = 0; owner < kLanes; ++owner) {  // all lanes reckon, what the owner finds counts
        const int quad = 8 * kChunk + owner;
        if (4 * quad >= a.width) return;
        const float* row = shared + 4 * quad * kColumns;
        float wanted[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) wanted[k] = gradient[kFirst + k];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 h = *reinterpret_cast<const float4*>(row + j * kColumns + 4 * quad);
            wanted[0] += value[kFirst + j] * h.x;
            wanted[1] += value[kFirst + j] * h.y;
            wanted[2] += value[kFirst + j] * h.z;
            wanted[3] += value[kFirst + j] * h.w;
        }
        const float* inverses = shared + kColumns * kColumns + 4 * kPairs * quad;
        const Choice best = best_pair(wanted, inverses, kept >> kFirst & 15, a.preference);
        if (lane == owner) kept = (kept & ~(15u << kFirst)) | best.kept << kFirst;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float change = __shfl_sync(~0u, value[kFirst + k] - best.value[k], owner, kLanes);
            if (lane == owner) value[kFirst + k] = best.value[k];
            add_row<0>(gradient, change, row + k * kColumns, lane);
        }
    }
}

__global__ void __launch_bounds__(kThreads, 2) reselect_kernel(const ReselectArguments a) {
    extern __shared__ float shared[];
    for (int i = threadIdx.x; i < 4 * kPairs * kQuads; i += kThreads) {
        shared[kColumns * kColumns + i] = i < kPairs * a.width ? a.inverses[i] : 0.0f;
    }
    load_square<false>(shared, a.hessian, a.stride, a.width);
    const int lane = threadIdx.x % kLanes;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const bool present = own < a.rows;
    const long long row = present ? own : a.rows - 1;

    float gradient[kOwned], value[kOwned];
    u32 kept = 0;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        const bool inside = column < a.width;
        gradient[i] = inside ? a.gradient[row * a.gradient_stride + column] : 0.0f;
        value[i] = inside ? a.values[row * a.stride + column] : 0.0f;
        if (inside && a.kept[row * a.stride + column]) kept |= 1u << i;
    }
    for (int walk = 0; walk < a.walks; ++walk) {
        reselect_chunk<0>(gradient, value, kept, shared, a, lane);
        reselect_chunk<1>(gradient, value, kept, shared, a, lane);
        reselect_chunk<2>(gradient, value, kept, shared, a, lane);
        reselect_chunk<3>(gradient, value, kept, shared, a, lane);
    }
    if (!present) return;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int column = column_of(lane, i / 4, i % 4);
        if (column >= a.width) continue;
        const long long place = row * a.stride + column;
        a.change[row * a.change_stride + column] = a.values[place] - value[i];
        a.values[place] = value[i];
        a.kept[place] = static_cast<u8>(kept >> i & 1);
    }
}
