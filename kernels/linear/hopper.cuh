// The Hopper kernels, dense and sparse, without their products: the consumer warps, what becomes of their sums, and the
// kernel.
//
// A warpgroup's 64 kTiles outputs are 4 kTiles fragments of 16; each of its warps takes kTiles neighbours, one for each of its
// packed tiles. So a lane's 2 kTiles outputs are neighbours, too.
#pragma once

#include "common/cluster.cuh"
#include "common/warpgroup.cuh"
#include "linear/producer.cuh"
#include "linear/epilogue.cuh"

// One consumer warp. `Outputs` is how a kernel keeps what this lane's neighbouring outputs are scaled by, and
// their bias: made of (p, tile_n, fragment, lane), it has the first output `n` and `round(low, high, r)` for two outputs of a
// token.
template <class T>
struct ConsumerWarp {
    static constexpr int kOutputs = 2 * T::kTiles;  // of a lane

    const HopperProblem& p;
    u8* const memory;
    const int warp, lane, tile, fragment;  // packed tile of the CTA, and this warp's first fragment of it
    PipelineState<T> state;                // the stage to multiply next
    float sums[T::kTiles][T::kFragments][4];

    __device__ __forceinline__ ConsumerWarp(const HopperProblem& problem, u8* memory_)
        : p(problem), memory(memory_), warp(__shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0)), lane(threadIdx.x % 32),
          tile(warp * T::kTiles / 4), fragment(warp * T::kTiles % 4) {}

    // Of this lane's two outputs in packed tile `r`, one of its rows.
    __device__ __forceinline__ u32 load_scales(u32 stage, int r, int row = 0) const {
        return *reinterpret_cast<const u32*>(memory + T::kScalesAt + stage * T::kStageScaleBytes + tile * T::kTileScaleBytes +
                                             row * kScaleBytes + lane / 4 * 16 + (fragment + r) * 4);
    }

    // Adds a group's sums, scaled.
    __device__ __forceinline__ static void collect(float (&into)[T::kFragments][4], float (&from)[T::kFragments][4],
                                                   u32 scales) {
        sums_are_ready(from);
        const float low = half_to_float(scales & 0xFFFF), high = half_to_float(scales >> 16);
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 4; ++e) into[f][e] += from[f][e] * (e < 2 ? low : high);
    }

    // True if the sums are those of all CTAs that share the tile, or become so here.
    __device__ __forceinline__ bool complete(const HopperWork& at) {
        auto& flat = reinterpret_cast<float (&)[T::kTiles * T::kFragments][4]>(sums);
        return at.whole(p) || reduce_over_ctas(p, at, blockIdx.x, warp, T::kConsumerWarps, lane, flat);
    }

    __device__ __forceinline__ void resume() {}

    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r) clear(sums[r]);
    }

    // The results of n8 tile `f`.
    template <class Outputs>
    __device__ __forceinline__ void store_fragment(const Outputs& outputs, int f, int first_token) const {
        float v[T::kTiles][4];
#pragma unroll
        for (int r = 0; r < T::kTiles; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) v[r][e] = sums[r][f][e];
        store(outputs, first_token + f * 8 + lane % 4 * 2, v);
    }

    // Every CTA of the cluster sums and stores its share of the n8 tiles. The pipelines are done with: sums are exchanged
    // there, in pieces, which are what a warp of one CTA has for another CTA.
    template <class Outputs>
    __device__ __forceinline__ void reduce_over_cluster(const HopperWork& at) {
        const u32 split = p.split, rank = blockIdx.x % split;
        const int share = (T::kFragments + p.split - 1) / p.split, mine = fragments_of(rank, share);
        const auto place_of = [&](u32 piece, int local, int r) {
            return (((piece * T::kConsumerWarps + warp) * share + local) * T::kTiles + r) * 512 + lane * 16;
        };
        // Staged sums lie in the order of those they are for; behind them arrive the others'.
        const auto piece_from = [&](u32 source, u32 owner) {
            return !T::kStaged || source == owner ? source : split + source - (source > owner);
        };
        const u32 shared = shared_address(memory), arrived = shared + T::kSumsBarrierAt;
        if (threadIdx.x == 0) barrier_expect(arrived, mine * (split - 1) * T::kTiles * T::kConsumerWarps * 512);
        named_barrier_sync<T::kConsumerThreads>();
        cluster_arrive(false);  // this CTA reads its pipeline no longer
        cluster_wait();
        u32 owner = 0;
        int local = 0;
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f) {
            const u32 there = address_in_cta(shared, owner);
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) {
                if (T::kStaged || owner == rank) {  // what a CTA keeps is read by the thread that wrote it
                    *reinterpret_cast<float4*>(memory + place_of(owner, local, r)) = as_vector(sums[r][f]);
                } else {
                    send_to_cta(there + place_of(rank, local, r), sums[r][f], there + T::kSumsBarrierAt);
                }
            }
            if (++local == share) {
                local = 0;
                ++owner;
            }
        }
        if constexpr (T::kStaged) {  // lane i copies the piece for CTA i
            const u32 to = lane, bytes = fragments_of(to, share) * T::kTiles * 512;
            copies_see_writes();
            __syncwarp();
            if (to < split && to != rank && bytes > 0)
                copy_to_cta(address_in_cta(shared + place_of(piece_from(rank, to), 0, 0) - lane * 16, to),
                            shared + place_of(to, 0, 0) - lane * 16, bytes, address_in_cta(arrived, to));
        }
        barrier_wait(arrived, 0);
        if (T::kStaged) cluster_arrive(false);  // what this CTA sent is needed until all have come so far
        const int tile_n = T::first_packed_tile(p, at) + tile, first_token = at.token_tile(p) * T::kTokens + rank * share * 8;
        if (tile_n < p.tiles_n) {
            const Outputs outputs(p, tile_n, fragment, lane);
#pragma unroll 1
            for (int f = 0; f < mine; ++f) {
                float v[T::kTiles][4];
#pragma unroll
                for (int r = 0; r < T::kTiles; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) v[r][e] = 0.f;
#pragma unroll 4
                for (u32 source = 0; source < split; ++source)
#pragma unroll
                    for (int r = 0; r < T::kTiles; ++r)
                        add(v[r], *reinterpret_cast<const float4*>(memory + place_of(piece_from(source, rank), f, r)));
                store(outputs, first_token + f * 8 + lane % 4 * 2, v);
            }
        }
        if (T::kStaged) cluster_wait();
    }

    // So many n8 tiles are the share of a CTA of the cluster.
    __device__ __forceinline__ static int fragments_of(u32 rank, int share) {
        const int left = T::kFragments - static_cast<int>(rank) * share;
        return left < 0 ? 0 : left < share ? left : share;
    }

    // Tokens `token` and the next of one n8 tile.
    template <class Outputs>
    __device__ __forceinline__ void store(const Outputs& outputs, int token, const float (&v)[T::kTiles][4]) const {
        const int n = outputs.n;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (token + e >= p.m) continue;
            u32 pairs[T::kTiles];
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) pairs[r] = outputs.round(v[r][e], v[r][2 + e], r);
            u8* const to = p.y + (static_cast<u64>(token + e) * p.n + n) * 2;
            if (p.n % kOutputs == 0) {
                if (n < p.n) store_together(to, pairs);
            } else {
#pragma unroll
                for (int o = 0; o < kOutputs; ++o)
                    if (n + o < p.n) reinterpret_cast<u16*>(to)[o] = static_cast<u16>(pairs[o / 2] >> (o % 2 * 16));
            }
        }
    }

    __device__ __forceinline__ static void store_together(u8* to, const u32 (&pairs)[T::kTiles]) {
        if constexpr (T::kTiles == 1) {
            *reinterpret_cast<u32*>(to) = pairs[0];
        } else if constexpr (T::kTiles == 2) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
        } else {
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
};

// Each kernel's own: a ConsumerWarp that can
//   begin()         convert the first weights of the first stage, which has arrived
//   multiply(more)  add the products of one stage to its sums; `more` unless it is the CTA's last
//   epilogue(at)      store the sums of a work range, or leave them to the warp that completes them
//   resume()        what `begin` must do again before the next work range
//   clear_sums()    before every work range
template <class T, class E, int kGroup>
struct Consumer;

template <class T, class E, int kGroup>
__device__ __forceinline__ void consume(Consumer<T, E, kGroup>& m) {
    wait_for_previous_kernel();  // it may still read what will be written here
    barrier_wait(T::full(shared_address(m.memory), 0), 0);
    m.begin();
    // Its registers would be missed in the loop over the stages.
    HopperWork& at = *reinterpret_cast<HopperWork*>(m.memory + T::kWorkAt + m.warp * sizeof(HopperWork));
    for (at = HopperWork::first(m.p, blockIdx.x, gridDim.x);; at.next(m.p, gridDim.x)) {
        m.clear_sums();
        const bool more = at.more(m.p);
#pragma unroll 1
        for (int left = at.end - at.begin; left > 0; --left) m.multiply(left > 1 || more);
        if constexpr (T::kBoxes > 1 && (kGroup == 0 || T::kRounded)) {  // products that nothing has waited for
            warpgroup_wait<0>();
#pragma unroll
            for (int r = 0; r < T::kTiles; ++r) sums_are_ready(m.sums[r]);
        }
        m.epilogue(at);
        if (!at.more(m.p)) return;  // asked again: while sums are stored, every register counts
        m.resume();
    }
}

template <class T, class E, int kGroup>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm) hopper_kernel(const __grid_constant__ HopperProblem p) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    if (threadIdx.x == T::kConsumerThreads) {
        prefetch_map(p.x);
        barrier_init(shared + T::kSumsBarrierAt, 1);
        for (u32 stage = 0; stage < T::kStages; ++stage) {
            barrier_init(T::full(shared, stage), 1);
            barrier_init(T::empty(shared, stage), T::kConsumerWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= T::kConsumerThreads) {
        release_registers<T::kProducerRegisters>();
        if (threadIdx.x == T::kConsumerThreads) Producer<T, kGroup>{p, shared}.run();
    } else {
        claim_registers<T::kConsumerRegisters>();
        Consumer<T, E, kGroup> m(p, memory);
        consume(m);
    }
}
