// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, on Hopper.
//
// The dense Hopper kernel (w4a16/hopper.cu) with sparse products: weights are the sparse operand A of wgmma.sp, dequantised
// into registers, their positions beside them. One thread of a warpgroup of its own is the producer, the others are consumers
// and drift apart.
#include "w24a16/few.cuh"
#include "w24a16/many.cuh"

template <int kTokens, int kConsumers, int kTiles, int kStages, int kCtasPerSm, int kScaleRows>
struct Hopper : HopperTile<kTokens, kConsumers, kTiles, kStages, kCtasPerSm, kSparseTile, kScaleRows, (kTokens >= 64)> {
    static constexpr bool kStaged = false;
};

template <bool kRounded>
struct Products {
    template <class T, class E, int kGroup>
    using Consumer = FewTokens<T, E, kGroup>;
};

template <>
struct Products<true> {
    template <class T, class E, int kGroup>
    using Consumer = ManyTokens<T, E, kGroup>;
};

template <class T, class E, int kGroup>
struct Consumer : Products<T::kRounded>::template Consumer<T, E, kGroup> {
    using Base = typename Products<T::kRounded>::template Consumer<T, E, kGroup>;
    using Base::Base;
};
