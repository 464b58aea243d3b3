// The gate of an MLP: silu(gate) * up, from one row that holds both. Eight elements per thread.
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 256;

struct GateArguments {
    const u16* both;  // [rows, 2 width]: gate, then up
    u16* out;         // [rows, width]
    u64 vectors;      // rows * width / 8
    int width;
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <class E>
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ GateArguments a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u64 v = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
    if (v >= a.vectors) return;
    const u64 per_row = a.width / 8, row = v / per_row, column = v % per_row;
    const Vec16* both = reinterpret_cast<const Vec16*>(a.both) + row * 2 * per_row + column;
    const Vec16 gate = both[0], up = both[per_row];
    Vec16 out;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const u32 act = E::round_pair(silu(E::widen(gate.word[p] & 0xFFFF)), silu(E::widen(gate.word[p] >> 16)));
        out.word[p] = E::round_pair(E::widen(act & 0xFFFF) * E::widen(up.word[p] & 0xFFFF),
                                    E::widen(act >> 16) * E::widen(up.word[p] >> 16));
    }
    reinterpret_cast<Vec16*>(a.out)[v] = out;
}
