// What the sparse Hopper kernels have in common behind the products: how sums become outputs.
#pragma once

#include "w24a16/sparse.cuh"
#include "linear/hopper.cuh"

template <class T, class E, int kGroup>
struct SparseConsumer : ConsumerWarp<T> {
    using Warp = ConsumerWarp<T>;
    using Warp::p, Warp::lane, Warp::tile, Warp::fragment;
    using Warp::Warp;

    struct Outputs {
        const HopperProblem& p;
        int n;
        u32 scale[T::kTiles], bias[T::kTiles];  // pairs of 16 bits

        __device__ __forceinline__ Outputs(const HopperProblem& problem, int tile_n, int fragment, int lane)
            : p(problem), n(tile_n * kTileRows + lane / 4 * 8 + fragment * 2) {
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) {
                if constexpr (kGroup == 0) scale[r] = *reinterpret_cast<const u32*>(p.scales + (n + 2 * r) * 2);
                bias[r] = 0;
                if (p.bias != nullptr) {
                    if (n + 2 * r < p.n) bias[r] = p.bias[n + 2 * r];
                    if (n + 2 * r + 1 < p.n) bias[r] |= static_cast<u32>(p.bias[n + 2 * r + 1]) << 16;
                }
            }
        }

        // Two outputs of one token.
        __device__ __forceinline__ u32 round(float low, float high, int r) const {
            const float growth = T::kRounded && kGroup > 0 ? E::growth(p.growth) : 1.f / E::kQuantum;
            low *= growth;
            high *= growth;
            if constexpr (kGroup == 0) {
                low *= half_to_float(scale[r] & 0xFFFF);
                high *= half_to_float(scale[r] >> 16);
            }
            return E::Output::round_pair(low + E::Output::widen(bias[r] & 0xFFFF), high + E::Output::widen(bias[r] >> 16));
        }
    };

    __device__ __forceinline__ void epilogue(const HopperWork& at) {
        if (p.split > 1) {
            Warp::template reduce_over_cluster<Outputs>(at);
            return;
        }
        const int tile_n = T::first_packed_tile(p, at) + tile, first_token = at.token_tile(p) * T::kTokens;
        if (tile_n >= p.tiles_n) return;
        if (!Warp::complete(at)) return;
        const Outputs outputs(p, tile_n, fragment, lane);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) Warp::store_fragment(outputs, f, first_token);
    }
};
