// Hopper's TMA unit: whole tiles from global to shared memory, issued by one thread, completion counted in bytes by an
// mbarrier. And what goes with a thread that only issues copies: handing its warps' registers to those that compute.
#pragma once

#include "common/types.cuh"

// A matrix in global memory as the TMA unit knows it: made by the driver (`ops/runtime/tensor_map.py`), opaque here.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// A barrier completes a phase when `arrivals` threads have arrived and all bytes that were announced are there. The
// phases alternate in parity; the first is 0.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the TMA unit and to the other CTAs of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same under a predicate instead of a branch.
__device__ __forceinline__ void barrier_arrive_if(bool wanted, u32 barrier) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %1, 0;\n@wanted mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(
            barrier),
        "r"(static_cast<int>(wanted))
        : "memory");
}

// Arrives and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity, if `wanted`. One piece of assembly without a C++ branch, so that ptxas
// does not take it for a divergence in the middle of asynchronous products.
__device__ __forceinline__ void barrier_wait_if(bool wanted, u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred wanted, done;\n"
                 "setp.ne.b32 wanted, %2, 0;\n"
                 "@!wanted bra DONE;\n"
                 "AGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE:\n"
                 "}\n" ::"r"(barrier),
                 "r"(parity), "r"(static_cast<int>(wanted))
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) { barrier_wait_if(true, barrier, parity); }

// `bytes` contiguous bytes, a multiple of 16 at both ends.
__device__ __forceinline__ void tma_load(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The map's box at (column, row); what lies outside the matrix arrives as zeros, and counts as bytes.
__device__ __forceinline__ void tma_load_box(u32 shared, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// For all warps of a warpgroup at once.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
