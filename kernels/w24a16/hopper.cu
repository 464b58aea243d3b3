// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W 2:4-sparse in 4 bits, on Hopper.
//
// The dense Hopper kernel (w4a16/hopper.cu) with sparse products: weights are the sparse operand A of wgmma.sp, dequantised
// into registers, their positions beside them. One thread of a warpgroup of its own issues copies, the others multiply and
// drift apart.
#include "w24a16/few.cuh"
#include "w24a16/many.cuh"

template <int kTokens, int kWarpgroups, int kTiles, int kSlots, int kResident>
struct Hopper : HopperTile<kTokens, kWarpgroups, kTiles, kSlots, kResident, kSparseTile, (kTokens >= 64)> {
    static constexpr bool kStaged = false;
};

template <bool kRounded>
struct Products {
    template <class T, class E, bool kGrouped>
    using Multiplier = FewTokens<T, E, kGrouped>;
};

template <>
struct Products<true> {
    template <class T, class E, bool kGrouped>
    using Multiplier = ManyTokens<T, E, kGrouped>;
};

template <class T, class E, bool kGrouped>
struct Multiplier : Products<T::kRounded>::template Multiplier<T, E, kGrouped> {
    using Base = typename Products<T::kRounded>::template Multiplier<T, E, kGrouped>;
    using Base::Base;
};
