// Hopper's warpgroup products: 64 outputs x kTokens tokens x 16 inputs (32 with sparse weights or e4m3) by four warps, weights
// from registers, activations from shared memory. Asynchronous: operands may not be touched between the fence and the wait.
#pragma once

#include "common/element.cuh"

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` committed groups still run.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// So many threads of a CTA wait for each other, at another barrier than all of them.
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
    asm volatile("bar.sync 15, %0;" ::"n"(kThreads) : "memory");
}

// Keeps uses of the sums below the wait before it.
template <int kFragments>
__device__ __forceinline__ void sums_are_ready(float (&sums)[kFragments][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[f][e])::"memory");
}

// Sums in float16, two tokens in a register: of each n8 tile, those of a lane's first row and of its second.
template <int kFragments>
__device__ __forceinline__ void sums_are_ready(u32 (&sums)[kFragments][2]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int row = 0; row < 2; ++row) asm volatile("" : "+r"(sums[f][row])::"memory");
}

// Operand B with the 128-byte swizzle: rows of 64 inputs, eight rows make a unit of 1 KB in which the 16-byte pieces of row r
// lie at piece ^ r, as the TMA unit writes them. `shared` is 1 KB aligned. Plus 2 (32 bytes / 16) per 16 inputs further on.
__device__ __forceinline__ u64 swizzled_descriptor(u32 shared) {
    return static_cast<u64>(shared >> 4) | 1ull << 16 | static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}

#define OPERANDS4(f) "+f"(d[f][0]), "+f"(d[f][1]), "+f"(d[f][2]), "+f"(d[f][3])
#define OPERANDS8(f) OPERANDS4(f), OPERANDS4(f + 1)
#define OPERANDS16(f) OPERANDS8(f), OPERANDS8(f + 2)
#define OPERANDS32(f) OPERANDS16(f), OPERANDS16(f + 4)
#define OPERANDS64(f) OPERANDS32(f), OPERANDS32(f + 8)
#define OPERANDS128(f) OPERANDS64(f), OPERANDS64(f + 16)

// The numbers of the sums' operands in an instruction.
#define ACCUMULATORS4 "%0, %1, %2, %3"
#define ACCUMULATORS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACCUMULATORS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ACCUMULATORS32                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ACCUMULATORS64                                                                                  \
    ACCUMULATORS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                   "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <class E, int kTokens>
struct Warpgroup;

// Adds to the sums, or replaces them when `add` is false. A0 to P are the operands' numbers after those of the sums.
#define ACCUMULATORS128                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WARPGROUP_PRODUCT(ELEMENT, TYPE, TOKENS, OPERANDS, ACCUMULATORS, A0, A1, A2, A3, B, P)                            \
    template <>                                                                                                           \
    struct Warpgroup<ELEMENT, TOKENS> {                                                                                   \
        __device__ __forceinline__ static void multiply(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b, bool add) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." TYPE "." TYPE " {" ACCUMULATORS "}, {" A0 \
                         ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;\n}\n"                                             \
                         : OPERANDS(0)                                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));               \
        }                                                                                                                 \
    };

#define WARPGROUP_PRODUCTS(ELEMENT, TYPE)                                                                      \
    WARPGROUP_PRODUCT(ELEMENT, TYPE, 8, OPERANDS4, ACCUMULATORS4, "%4", "%5", "%6", "%7", "%8", "%9")          \
    WARPGROUP_PRODUCT(ELEMENT, TYPE, 16, OPERANDS8, ACCUMULATORS8, "%8", "%9", "%10", "%11", "%12", "%13")     \
    WARPGROUP_PRODUCT(ELEMENT, TYPE, 32, OPERANDS16, ACCUMULATORS16, "%16", "%17", "%18", "%19", "%20", "%21") \
    WARPGROUP_PRODUCT(ELEMENT, TYPE, 64, OPERANDS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37") \
    WARPGROUP_PRODUCT(ELEMENT, TYPE, 128, OPERANDS64, ACCUMULATORS64, "%64", "%65", "%66", "%67", "%68", "%69")

WARPGROUP_PRODUCTS(Half, "f16")
WARPGROUP_PRODUCTS(Bfloat16, "bf16")

// 32 inputs of one byte each; the sums are float16.
#define PAIRS2(f) "+r"(d[f][0]), "+r"(d[f][1])
#define PAIRS8(f) PAIRS2(f), PAIRS2(f + 1), PAIRS2(f + 2), PAIRS2(f + 3)
#define PAIRS32(f) PAIRS8(f), PAIRS8(f + 4), PAIRS8(f + 8), PAIRS8(f + 12)
#define PAIRS64(f) PAIRS32(f), PAIRS32(f + 16)

#define HALF_SUMS_PRODUCT(TOKENS, PAIRS, ACCUMULATORS, A0, A1, A2, A3, B, P)                                              \
    template <>                                                                                                           \
    struct Warpgroup<E4m3, TOKENS> {                                                                                      \
        __device__ __forceinline__ static void multiply(u32 (&d)[TOKENS / 8][2], const u32 (&a)[4], u64 b, bool add) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k32.f16.e4m3.e4m3 {" ACCUMULATORS "}, {" A0 ", " A1 \
                         ", " A2 ", " A3 "}, " B ", p, 1, 1;\n}\n"                                                        \
                         : PAIRS(0)                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));               \
        }                                                                                                                 \
    };

HALF_SUMS_PRODUCT(128, PAIRS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37")
HALF_SUMS_PRODUCT(256, PAIRS64, ACCUMULATORS64, "%64", "%65", "%66", "%67", "%68", "%69")

#undef HALF_SUMS_PRODUCT
#undef PAIRS64
#undef PAIRS32
#undef PAIRS8
#undef PAIRS2

// The same of 2:4-sparse weights: kept ones and their positions, of which the hardware reads those of two lanes of each four.
template <class E, int kTokens>
struct SparseWarpgroup;

#define SPARSE_PRODUCT(ELEMENT, TYPE, TOKENS, OPERANDS, ACCUMULATORS, A0, A1, A2, A3, B, POSITIONS, SELECTOR, P)             \
    template <>                                                                                                              \
    struct SparseWarpgroup<ELEMENT, TOKENS> {                                                                                \
        template <int kSelector>                                                                                             \
        __device__ __forceinline__ static void multiply(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b, u32 positions,  \
                                                        bool add) {                                                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                      \
                         "wgmma.mma_async.sp.sync.aligned.m64n" #TOKENS "k32.f32." TYPE "." TYPE " {" ACCUMULATORS "}, {" A0 \
                         ", " A1 ", " A2 ", " A3 "}, " B ", " POSITIONS ", " SELECTOR ", p, 1, 1, 0;\n}\n"                   \
                         : OPERANDS(0)                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(positions), "n"(kSelector),               \
                           "r"(static_cast<int>(add)));                                                                      \
        }                                                                                                                    \
    };

#define SPARSE_PRODUCTS(ELEMENT, TYPE)                                                                                       \
    SPARSE_PRODUCT(ELEMENT, TYPE, 8, OPERANDS4, ACCUMULATORS4, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11")             \
    SPARSE_PRODUCT(ELEMENT, TYPE, 16, OPERANDS8, ACCUMULATORS8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15")        \
    SPARSE_PRODUCT(ELEMENT, TYPE, 32, OPERANDS16, ACCUMULATORS16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23")    \
    SPARSE_PRODUCT(ELEMENT, TYPE, 64, OPERANDS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")    \
    SPARSE_PRODUCT(ELEMENT, TYPE, 128, OPERANDS64, ACCUMULATORS64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")   \
    SPARSE_PRODUCT(ELEMENT, TYPE, 256, OPERANDS128, ACCUMULATORS128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", \
                   "%135")

SPARSE_PRODUCTS(Half, "f16")
SPARSE_PRODUCTS(Bfloat16, "bf16")

#undef SPARSE_PRODUCTS
#undef SPARSE_PRODUCT
#undef WARPGROUP_PRODUCTS
#undef WARPGROUP_PRODUCT
#undef OPERANDS4
#undef OPERANDS8
#undef OPERANDS16
#undef OPERANDS32
#undef OPERANDS64
#undef OPERANDS128
#undef ACCUMULATORS4
#undef ACCUMULATORS8
#undef ACCUMULATORS16
#undef ACCUMULATORS32
#undef ACCUMULATORS64
#undef ACCUMULATORS128
