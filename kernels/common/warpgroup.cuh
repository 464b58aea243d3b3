// Hopper's warpgroup products: 64 outputs x kTokens tokens x 16 inputs by four warps, weights from registers, activations from
// shared memory. Asynchronous: operands may not be touched between the fence and the wait.
#pragma once

#include "common/element.cuh"

__device__ __forceinline__ void warpgroup_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups still run.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps uses of the sums below the wait before it.
template <int kFragments>
__device__ __forceinline__ void sums_are_ready(float (&sums)[kFragments][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[f][e])::"memory");
}

// Orders this thread's ordinary writes to shared memory (cp.async counts) before reads by the tensor cores.
__device__ __forceinline__ void fence_for_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Operand B without swizzle: units of 8 rows x 16 bytes, 128 contiguous bytes each. `row_step` leads from 8 rows to the next
// 8, `input_step` from 8 inputs to the next 8.
__device__ __forceinline__ u64 matrix_descriptor(u32 shared, u32 input_step, u32 row_step) {
    return static_cast<u64>(shared >> 4) | static_cast<u64>(input_step >> 4) << 16 | static_cast<u64>(row_step >> 4) << 32;
}

template <class E, int kTokens>
struct Warpgroup;

#define OPERANDS4(f) "+f"(d[f][0]), "+f"(d[f][1]), "+f"(d[f][2]), "+f"(d[f][3])
#define OPERANDS8(f) OPERANDS4(f), OPERANDS4(f + 1)
#define OPERANDS16(f) OPERANDS8(f), OPERANDS8(f + 2)
#define OPERANDS32(f) OPERANDS16(f), OPERANDS16(f + 4)

// Adds to the sums, or replaces them when `add` is false. ACCUMULATORS spells %0 to %(count - 1); A0 to P are the next numbers.
#define WARPGROUP_PRODUCT(ELEMENT, TYPE, TOKENS, OPERANDS, ACCUMULATORS, A0, A1, A2, A3, B, P)                              \
    template <>                                                                                                             \
    struct Warpgroup<ELEMENT, TOKENS> {                                                                                     \
        __device__ __forceinline__ static void multiply(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b, bool add) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." TYPE "." TYPE " {" ACCUMULATORS "}, {" A0   \
                         ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;\n}\n"                                               \
                         : OPERANDS(0)                                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                 \
        }                                                                                                                   \
    };

#define ACCUMULATORS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACCUMULATORS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ACCUMULATORS32                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

WARPGROUP_PRODUCT(Half, "f16", 16, OPERANDS8, ACCUMULATORS8, "%8", "%9", "%10", "%11", "%12", "%13")
WARPGROUP_PRODUCT(Half, "f16", 32, OPERANDS16, ACCUMULATORS16, "%16", "%17", "%18", "%19", "%20", "%21")
WARPGROUP_PRODUCT(Half, "f16", 64, OPERANDS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37")
WARPGROUP_PRODUCT(Bfloat16, "bf16", 16, OPERANDS8, ACCUMULATORS8, "%8", "%9", "%10", "%11", "%12", "%13")
WARPGROUP_PRODUCT(Bfloat16, "bf16", 32, OPERANDS16, ACCUMULATORS16, "%16", "%17", "%18", "%19", "%20", "%21")
WARPGROUP_PRODUCT(Bfloat16, "bf16", 64, OPERANDS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37")

#undef WARPGROUP_PRODUCT
#undef OPERANDS4
#undef OPERANDS8
#undef OPERANDS16
#undef OPERANDS32
#undef ACCUMULATORS8
#undef ACCUMULATORS16
#undef ACCUMULATORS32
