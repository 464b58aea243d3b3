// Hopper's sparse warpgroup products: 64 outputs x kTokens tokens x 32 inputs by four warps, kept weights and their positions from
// registers, activations from shared memory. The counterpart of common/warpgroup.cuh.
#pragma once

#include "common/warpgroup.cuh"

template <class E, int kTokens>
struct SparseWarpgroup;

#define OPERANDS4(f) "+f"(d[f][0]), "+f"(d[f][1]), "+f"(d[f][2]), "+f"(d[f][3])
#define OPERANDS8(f) OPERANDS4(f), OPERANDS4(f + 1)
#define OPERANDS16(f) OPERANDS8(f), OPERANDS8(f + 2)
#define OPERANDS32(f) OPERANDS16(f), OPERANDS16(f + 4)
#define OPERANDS64(f) OPERANDS32(f), OPERANDS32(f + 8)

// Adds to the sums, or replaces them when `add` is false. ACCUMULATORS spells %0 to %(count - 1); A0 to P are the next numbers.
#define SPARSE_PRODUCT(ELEMENT, TYPE, TOKENS, OPERANDS, ACCUMULATORS, A0, A1, A2, A3, B, POSITIONS, SELECTOR, P)               \
    template <>                                                                                                                \
    struct SparseWarpgroup<ELEMENT, TOKENS> {                                                                                  \
        template <int kSelector>                                                                                               \
        __device__ __forceinline__ static void multiply(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b, u32 positions,    \
                                                        bool add) {                                                            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                        \
                         "wgmma.mma_async.sp.sync.aligned.m64n" #TOKENS "k32.f32." TYPE "." TYPE " {" ACCUMULATORS "}, {" A0   \
                         ", " A1 ", " A2 ", " A3 "}, " B ", " POSITIONS ", " SELECTOR ", p, 1, 1, 0;\n}\n"                     \
                         : OPERANDS(0)                                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(positions), "n"(kSelector),                 \
                           "r"(static_cast<int>(add)));                                                                        \
        }                                                                                                                      \
    };

#define ACCUMULATORS4 "%0, %1, %2, %3"
#define ACCUMULATORS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACCUMULATORS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ACCUMULATORS32                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ACCUMULATORS64                                                                                         \
    ACCUMULATORS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                   "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SPARSE_PRODUCTS(ELEMENT, TYPE)                                                                                         \
    SPARSE_PRODUCT(ELEMENT, TYPE, 8, OPERANDS4, ACCUMULATORS4, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11")               \
    SPARSE_PRODUCT(ELEMENT, TYPE, 16, OPERANDS8, ACCUMULATORS8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15")          \
    SPARSE_PRODUCT(ELEMENT, TYPE, 32, OPERANDS16, ACCUMULATORS16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23")      \
    SPARSE_PRODUCT(ELEMENT, TYPE, 64, OPERANDS32, ACCUMULATORS32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")      \
    SPARSE_PRODUCT(ELEMENT, TYPE, 128, OPERANDS64, ACCUMULATORS64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")

SPARSE_PRODUCTS(Half, "f16")
SPARSE_PRODUCTS(Bfloat16, "bf16")

#undef SPARSE_PRODUCTS
#undef SPARSE_PRODUCT
#undef OPERANDS4
#undef OPERANDS8
#undef OPERANDS16
#undef OPERANDS32
#undef OPERANDS64
#undef ACCUMULATORS4
#undef ACCUMULATORS8
#undef ACCUMULATORS16
#undef ACCUMULATORS32
#undef ACCUMULATORS64
