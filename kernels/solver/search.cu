// The scale of each group, judged by Σ h_j (w_j - q_j)², h = mean energy of the input channels: a coarse pass over ratios of
// the widest scale that the grid could need, in both signs, and a fine pass around the best.
#include "solver/grid.cuh"

constexpr int kCoarse = 31, kFine = 9;

struct SearchArguments {
    const float* weight;  // [N, K]
    const float* energy;  // [K]
    float* scales;        // [N, groups]
    long long stride;     // K
    int rows;
    int groups;
    int is_signed;
    int bfloat16;
    float coarse[kCoarse];
    float fine[kFine];
};

template <int kGroup>
__global__ void __launch_bounds__(kThreads) search_kernel(const SearchArguments a) {
    constexpr int kEach = kGroup / kLanes;
    const long long total = static_cast<long long>(a.rows) * a.groups;
    const long long own = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const long long place = own < total ? own : total - 1;
    const long long row = place / a.groups;
    const int group = static_cast<int>(place % a.groups), lane = threadIdx.x % kLanes;

    float weight[kEach], energy[kEach], widest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int column = group * kGroup + i * kLanes + lane;
        weight[i] = a.weight[row * a.stride + column];
        energy[i] = a.energy[column];
        widest = fmaxf(widest, fabsf(weight[i]));
    }
    widest = row_max(widest) * (1.0f / kZero);
    float best = storable(widest, a.bfloat16), best_cost = __int_as_float(0x7f800000), best_ratio = 1.0f;

    const auto consider = [&](float ratio, float sign) {
        const float scale = storable(widest * ratio * sign, a.bfloat16);
        float cost = 0.0f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float error = decode(encode(weight[i], scale), scale) - weight[i];
            cost += error * error * energy[i];
        }
        cost = row_sum(cost);
        if (cost < best_cost) {
            best_cost = cost;
            best = scale;
            best_ratio = ratio;
        }
    };
    for (int i = 0; i < kCoarse; ++i) {
        consider(a.coarse[i], 1.0f);
        if (a.is_signed) consider(a.coarse[i], -1.0f);
    }
    const float centre = best_ratio, side = best < 0.0f ? -1.0f : 1.0f;
    for (int i = 0; i < kFine; ++i) consider((centre + a.fine[i]) * side, 1.0f);
    if (own < total && lane == 0) a.scales[place] = best;
}
