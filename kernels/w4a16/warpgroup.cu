// y[M, N] = x[M, K] * W[N, K]^T (+ bias), W in 4 bits, on Hopper, for more than a handful of tokens.
//
// The transposed product again: weights are operand A of wgmma, dequantised into registers; tokens are its n dimension and come
// from shared memory. The four warps of a warpgroup are the four m16 tiles of a packed tile, so every weight is dequantised
// once per tile of tokens and a lane has few sums: there is room for a second set, to which the group's scale is applied in
// float32.
#include "common/warpgroup.cuh"
#include "w4a16/finish.cuh"

template <int kTokens_,      // tokens per block: 16, 32 or 64
          int kWarpgroups_,  // warpgroups side by side along the outputs, 64 each
          int kSlots_,       // slots of the ring, one group of 128 inputs each; all but two are in flight
          int kResident_>    // blocks that must fit on a multiprocessor, which caps the registers
struct Grouped {
    static constexpr int kTokens = kTokens_, kWarpgroups = kWarpgroups_, kSlots = kSlots_, kResident = kResident_;
    static constexpr int kThreads = 128 * kWarpgroups, kWarps = 4 * kWarpgroups;
    static constexpr int kFragments = kTokens / 8;    // n8 blocks: float4 of sums per lane
    // A slot: codes, scales, activations. The latter in units of 8 rows x 16 bytes, as the tensor cores read them.
    static constexpr int kScalesAt = kWarpgroups * kTileBytes;
    static constexpr int kTokensAt = kScalesAt + kWarpgroups * kScaleBytes;
    static constexpr int kSlotBytes = kTokensAt + kTokens * kGroup * 2;
    static constexpr int kInputStep = kTokens * 16;  // from 8 inputs to the next 8
};

// Where the next group of a run lies, and how many are left in its segment.
template <class T>
struct GroupCursor {
    const Problem& p;
    Segment segment;
    int left;  // groups of the segment; 0 at the end of the run

    __device__ __forceinline__ explicit GroupCursor(const Problem& problem)
        : p(problem), segment(Segment::first<T::kWarpgroups>(problem)), left(segment.end - segment.begin) {}

    // True when the next group begins another segment.
    __device__ __forceinline__ bool advance() {
        if (--left > 0 || segment.left == 0) return false;
        segment.template next<T::kWarpgroups>(p);
        left = segment.end - segment.begin;
        return true;
    }
};

// Each warpgroup copies its own tile: 4 KB of codes, 32 bytes per thread, and 128 bytes of scales.
template <class T, bool kGrouped>
struct WeightStream {
    GroupCursor<T> at;
    const int warpgroup, thread;
    const u8 *codes, *scales;  // this thread's bytes of the next group
    bool has_outputs;

    __device__ __forceinline__ explicit WeightStream(const Problem& p)
        : at(p), warpgroup(threadIdx.x / 128), thread(threadIdx.x % 128) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const u64 tile = static_cast<u64>(at.segment.tile_n + warpgroup) * at.p.groups + at.segment.begin;
        codes = at.p.codes + tile * kTileBytes + thread * 16;
        scales = at.p.scales + tile * kScaleBytes + thread * 16;
        has_outputs = at.segment.tile_n + warpgroup < at.p.tiles_n;
    }

    __device__ __forceinline__ void load(u32 slot) {
        const bool wanted = at.left > 0 && has_outputs;
        const u32 to = slot + warpgroup * kTileBytes + thread * 16;
        copy_async_if(wanted, to, codes);
        copy_async_if(wanted, to + kHalfBytes, codes + kHalfBytes);
        if constexpr (kGrouped)
            copy_async_if(wanted && thread < kScaleBytes / 16, slot + T::kScalesAt + warpgroup * kScaleBytes + thread * 16, scales);
        codes += kTileBytes;
        scales += kScaleBytes;
        if (at.advance()) seek();
    }
};

// A warp copies 8 rows x 64 bytes at a time: whole sectors there, different banks here. Rows past the last token are neither
// loaded nor cleared: their columns of the product are never stored.
template <class T>
struct TokenStream {
    static constexpr int kPatches = T::kTokens / 8 * 4, kRows = T::kWarps / 4 * 8;  // rows that all warps copy at once

    GroupCursor<T> at;
    const int row, unit;  // this thread's row in the first round, and its 16 bytes of it
    const u64 jump;       // bytes from round to round
    const u8* source;
    int rows_left;  // rows from this thread's first to the last token

    __device__ __forceinline__ explicit TokenStream(const Problem& p)
        : at(p), row(threadIdx.x / 128 * 8 + threadIdx.x % 8), unit(threadIdx.x / 32 % 4 * 4 + threadIdx.x % 32 / 8),
          jump(static_cast<u64>(p.groups) * (kGroup * 2) * kRows) {
        seek();
    }

    __device__ __forceinline__ void seek() {
        const int token = at.segment.token_tile * T::kTokens + row;
        source = at.p.x + (static_cast<u64>(token) * at.p.groups + at.segment.begin) * (kGroup * 2) + unit * 16;
        rows_left = at.p.m - token;
    }

    __device__ __forceinline__ void load(u32 slot) {
        const u32 to = slot + T::kTokensAt + unit * T::kInputStep + row * 16;
        const int rows = at.left > 0 ? rows_left : 0;
        const u8* from = source;
#pragma unroll
        for (int first = 0; first < T::kTokens; first += kRows, from += jump)
            copy_async_if(first < rows && (T::kTokens % kRows == 0 || first + row < T::kTokens), to + first * 16, from);
        source += kGroup * 2;
        if (at.advance()) seek();
    }
};

template <class T, class E, bool kGrouped>
struct Block {
    const Problem& p;
    u8* const ring;
    const int warp, lane, warpgroup, fragment;  // fragment: which m16 tile of the warpgroup's 64 outputs
    float sums[T::kFragments][4];
    float part[T::kFragments][4];  // of the group that the tensor cores are working on
    u32 scales;                    // of that group: this lane's two outputs

    __device__ __forceinline__ Block(const Problem& problem, u8* shared)
        : p(problem), ring(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warpgroup(warp / 4), fragment(warp % 4) {}

    __device__ __forceinline__ void run() {
        WeightStream<T, kGrouped> weights(p);
        TokenStream<T> tokens(p);
        const u32 begin = shared_address(ring);
        // Weights do not depend on the previous kernel: the ring fills with them while that one finishes. They are part of the
        // first commit group of the activations, since groups complete in order.
#pragma unroll 1
        for (int s = 0; s < T::kSlots - 2; ++s) weights.load(begin + s * T::kSlotBytes);
        wait_for_previous_kernel();
        let_next_kernel_start();
#pragma unroll 1
        for (int s = 0; s < T::kSlots - 2; ++s) {
            tokens.load(begin + s * T::kSlotBytes);
            copy_async_commit();
        }
        // Byte offsets. The tensor cores may still read the slot before this one, so the one before that is filled.
        u32 full = 0, empty = (T::kSlots - 2) * T::kSlotBytes;
        clear(sums);
        clear_part();
        for (Segment at = Segment::first<T::kWarpgroups>(p);; at.template next<T::kWarpgroups>(p)) {
            // No branch in this loop that ptxas could take for divergent: it would wait for the tensor cores before each.
            // Warpgroups without outputs therefore multiply too, whatever their slots hold.
            for (int group = at.begin; group < at.end; ++group) {
                copy_async_wait<T::kSlots - 3>();
                fence_for_tensor_cores();
                __syncthreads();  // this slot is full for all, and all are done with the second before it
                weights.load(begin + empty);
                tokens.load(begin + empty);
                copy_async_commit();
                multiply(full);
                full = next(full);
                empty = next(empty);
            }
            collect();
            if (at.tile_n + warpgroup < p.tiles_n) finish(at);
            if (at.left == 0) return;
            clear(sums);
            clear_part();
        }
    }

    __device__ __forceinline__ static u32 next(u32 slot) {
        return slot + T::kSlotBytes == T::kSlots * T::kSlotBytes ? 0 : slot + T::kSlotBytes;
    }

    // One group: two batches of four k16 steps. While a batch runs, the next is dequantised; the second batch runs on through
    // the barrier and the first dequantisation of the next group.
    __device__ __forceinline__ void multiply(u32 slot) {
        const u8* const codes = ring + slot + warpgroup * kTileBytes + fragment * 512 + lane * 16;
        const u32 tokens = shared_address(ring) + slot + T::kTokensAt;
        u32 a[2][4][4];
        warpgroup_wait<1>();  // the registers of the first batch are free
        dequantize(a[0], codes);
        collect();
        issue(a[0], tokens, true);
        dequantize(a[1], codes + kHalfBytes);
        issue(a[1], tokens + 8 * T::kInputStep, false);
        if constexpr (kGrouped)
            scales = *reinterpret_cast<const u32*>(ring + slot + T::kScalesAt + warpgroup * kScaleBytes + lane / 4 * 16 + fragment * 4);
    }

    __device__ __forceinline__ static void dequantize(u32 (&a)[4][4], const u8* codes) {
        const Vec16 q = *reinterpret_cast<const Vec16*>(codes);
#pragma unroll
        for (int step = 0; step < 4; ++step) E::dequantize(q.word[step], a[step]);
    }

    __device__ __forceinline__ void issue(const u32 (&a)[4][4], u32 tokens, bool first) {
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Warpgroup<E, T::kTokens>::multiply(kGrouped ? part : sums, a[step],
                                               matrix_descriptor(tokens + step * 2 * T::kInputStep, T::kInputStep, 128),
                                               !kGrouped || !first || step > 0);
        warpgroup_commit();
    }

    // Nothing to collect yet.
    __device__ __forceinline__ void clear_part() {
        clear(part);
        scales = 0;
    }

    // Waits for the group in the tensor cores and adds its sums, scaled.
    __device__ __forceinline__ void collect() {
        warpgroup_wait<0>();
        if constexpr (!kGrouped) {
            sums_are_ready(sums);
        } else {
            sums_are_ready(part);
            const float low = half_to_float(scales & 0xFFFF), high = half_to_float(scales >> 16);
#pragma unroll
            for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[f][e] += part[f][e] * (e < 2 ? low : high);
        }
    }

    __device__ __forceinline__ void finish(const Segment& segment) {
        if (segment.whole(p) || sum_over_blocks(p, segment, warp, T::kWarps, lane, sums))
            store(segment.tile_n + warpgroup, segment.token_tile * T::kTokens);
    }

    // A lane holds two neighbouring outputs of two tokens per n8 block.
    __device__ __forceinline__ void store(int tile_n, int first_token) const {
        const int n = tile_n * kTileRows + lane / 4 * 8 + fragment * 2;
        float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            if constexpr (!kGrouped) scale[o] = half_to_float(reinterpret_cast<const u16*>(p.scales)[n + o]);
            if (p.bias != nullptr && n + o < p.n) bias[o] = E::widen(p.bias[n + o]);
        }
#pragma unroll
        for (int f = 0; f < T::kFragments; ++f)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = first_token + f * 8 + lane % 4 * 2 + e;
                if (token >= p.m) continue;
                const u32 pair = E::round_pair(sums[f][e] * scale[0] + bias[0], sums[f][2 + e] * scale[1] + bias[1]);
                u8* const to = p.y + (static_cast<u64>(token) * p.n + n) * 2;
                if (p.n % 2 == 0) {
                    if (n < p.n) *reinterpret_cast<u32*>(to) = pair;
                } else {
#pragma unroll
                    for (int o = 0; o < 2; ++o)
                        if (n + o < p.n) reinterpret_cast<u16*>(to)[o] = static_cast<u16>(pair >> (o * 16));
                }
            }
    }
};

template <class T, class E, bool kGrouped>
__global__ void __launch_bounds__(T::kThreads, T::kResident) warpgroup_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) u8 ring[];
    Block<T, E, kGrouped>(p, ring).run();
}
