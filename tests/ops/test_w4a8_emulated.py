"""`kernels/w4a8/ada.cu` on a CPU: its source, compiled for the host, lanes as fibers, PTX replaced by what its manual says.

Matrices, products and copies are those of the manual: who holds which element, and copies that arrive no sooner than they are
waited for. So an index or a barrier that is wrong is found without a GPU; what tensor cores round is not.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin_tools.ops.linear import fp8_reference
from marlin_tools.ops.linear.decomposition import Decomposition
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES
from marlin_tools.ops.linear.layout import PackedWeight, pack
from marlin_tools.ops.linear.operator import group_of
from marlin_tools.ops.linear.tiles import types_of
from marlin_tools.ops.linear.w4a16 import decompose
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.resources import kernels_dir

TILES = {name: tile for name, tile in FP8_TILES.items() if tile.kernel == "ada"}

TYPES = r"""
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>
#include <utility>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned; using u64 = unsigned long long;
struct alignas(16) Vec16 { u32 word[4]; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { u32 x; } threadIdx, blockIdx;
extern __attribute__((aligned(128))) u8 pipeline[];
inline u32 shared_address(const void* p) { return static_cast<const u8*>(p) - pipeline; }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

[[noreturn]] inline void fail(const char* what) { std::fprintf(stderr, "%s\n", what); std::exit(1); }

struct Barrier { u32 threads, here, round; };
struct Copy { u32 to; const void* from; };
struct Fiber {
    ucontext_t context;
    const Barrier* waits_for;
    u32 round;
    bool done;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
} fibers[256];
struct Warp { Barrier barrier; u32 address[32], a[32][4], b[32][2], shuffled[32]; } warps[8];
Barrier block;
ucontext_t scheduler;

inline void sync(Barrier& b) {
    Fiber& me = fibers[threadIdx.x];
    me.round = b.round;
    if (++b.here == b.threads) {
        b.here = 0;
        ++b.round;
        return;
    }
    me.waits_for = &b;
    swapcontext(&me.context, &scheduler);
}
inline Warp& warp_of_lane() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { sync(block); }
inline void __syncwarp() { sync(warp_of_lane().barrier); }
inline u32 __shfl_sync(u32, u32 value, int from) {
    Warp& w = warp_of_lane();
    w.shuffled[threadIdx.x % 32] = value;
    sync(w.barrier);
    value = w.shuffled[from];
    sync(w.barrier);
    return value;
}
"""

COPIES = r"""
#pragma once
#include "common/types.cuh"
inline void copy_async(u32 to, const void* from) { fibers[threadIdx.x].open.push_back({to, from}); }
inline void copy_async_commit() {
    Fiber& me = fibers[threadIdx.x];
    me.committed.push_back(std::move(me.open));
    me.open.clear();
}
template <int kPending>
void copy_async_wait() {
    for (auto& groups = fibers[threadIdx.x].committed; groups.size() > kPending; groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(pipeline + copy.to, copy.from, 16);
}
inline float4 load_published(const float4* p) { return *p; }
inline u32 arrive(u32* counter) { return (*counter)++; }
inline u32 peek(const u32* counter) { return *counter; }
"""

ELEMENTS = r"""
#pragma once
#include <cmath>
#include "common/types.cuh"
template <int kZero_, int>
struct Grid { static constexpr int kZero = kZero_; };
template <class, class Operand_, class Output_, class Grid_>
struct Types {
    using Operand = Operand_; using Output = Output_; using Grid = Grid_;
    static constexpr float kQuantum = Operand::kQuantum;
};
inline float half_to_float(u16 h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(1.f * mantissa, -24);
    return h >> 15 ? -size : size;
}
const struct Decoded {
    float of[256];
    Decoded() {
        for (int v = 0; v < 256; ++v) {
            const int exponent = v >> 3 & 15, mantissa = v & 7;
            const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(1.f * mantissa, -9);
            of[v] = (v & 127) == 127 ? NAN : v >> 7 ? -size : size;
        }
    }
} e4m3;
struct Bfloat16 {
    static float widen(u16 h) { const u32 bits = h << 16; float f; std::memcpy(&f, &bits, 4); return f; }
    static u32 round(float f) {
        u32 bits; std::memcpy(&bits, &f, 4);
        return std::isnan(f) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    static u32 round_pair(float low, float high) { return round(low) | round(high) << 16; }
};
// m16n8k32: lane 4 g + t has bytes 4 t to 4 t + 3 of each 16, of rows g and g + 8 of A, of column g of B.
struct E4m3 {
    static constexpr int kBytes = 1;
    static constexpr float kQuantum = 1.f / 512;
    template <int kZero>
    static void dequantize(u32 q, u32& even, u32& odd) {
        even = odd = 0;
        for (int nibble = 0; nibble < 8; ++nibble) {
            const int code = static_cast<int>(q >> 4 * nibble & 15) - kZero;
            (nibble % 2 ? odd : even) |= static_cast<u32>(std::abs(code) | (code < 0 ? 128 : 0)) << nibble / 2 * 8;
        }
    }
    static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        Warp& w = warp_of_lane();
        const int lane = threadIdx.x % 32;
        std::memcpy(w.a[lane], a, 16);
        w.b[lane][0] = b0;
        w.b[lane][1] = b1;
        sync(w.barrier);
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            for (int k = 0; k < 32; ++k) {
                const u32 left = w.a[row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row / 8] >> k % 4 * 8;
                const u32 right = w.b[column * 4 + k % 16 / 4][k / 16] >> k % 4 * 8;
                c[e] += e4m3.of[left & 255] * e4m3.of[right & 255];
            }
        }
        sync(w.barrier);
    }
};
// ldmatrix: lanes 8 m to 8 m + 7 say where the rows of matrix m are, lane 4 g + t gets bytes 4 t to 4 t + 3 of row g.
inline void load_matrices(u32 (&r)[4], u32 shared) {
    Warp& w = warp_of_lane();
    const int lane = threadIdx.x % 32;
    w.address[lane] = shared;
    sync(w.barrier);
    for (int m = 0; m < 4; ++m) {
        u32 banks = 0;
        for (int row = 0; row < 8; ++row) banks |= 1u << w.address[8 * m + row] / 16 % 8;
        if (banks != 255 || shared % 16) fail("a matrix whose rows share banks");
        std::memcpy(&r[m], pipeline + w.address[8 * m + lane / 4] + lane % 4 * 4, 4);
    }
    sync(w.barrier);
}
"""

PROGRAM = r"""
#include <string>
#include "w4a8/ada.cu"
alignas(128) u8 pipeline[SHARED];
static Problem problem;
static char stacks[256][1 << 16];

static void enter() {
    ada_kernel<KERNEL>(problem);
    fibers[threadIdx.x].done = true;
}

static void run_cta(bool backwards) {
    std::memset(pipeline, 0xFF, SHARED);  // not a number, neither as e4m3 nor as a scale
    block = {256, 0, 0};
    for (Warp& warp : warps) warp.barrier = {32, 0, 0};
    for (int i = 0; i < 256; ++i) {
        Fiber& fiber = fibers[i];
        fiber.waits_for = nullptr;
        fiber.done = false;
        fiber.open.clear();
        fiber.committed.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i];
        fiber.context.uc_stack.ss_size = sizeof stacks[i];
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < 256; ++i) {
            threadIdx.x = backwards ? 255 - i : i;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
            fiber.waits_for = nullptr;
            swapcontext(&scheduler, &fiber.context);
            moved = true;
        }
    }
    for (const Fiber& fiber : fibers)
        if (!fiber.done) fail("threads that wait for ever");
}

static std::vector<u8> read(const std::string& path) {
    std::vector<u8> bytes;
    std::FILE* const file = std::fopen(path.c_str(), "rb");
    for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(c);
    std::fclose(file);
    return bytes;
}

int main(int, char** argv) {
    const std::string folder = argv[1];
    int numbers[10];
    for (int i = 0; i < 10; ++i) numbers[i] = std::atoi(argv[2 + i]);
    const auto [m, n, tiles_n, tiles_k, token_tiles, split, run, longer, ctas, backwards] = numbers;
    const auto x = read(folder + "/x"), codes = read(folder + "/codes"), scales = read(folder + "/scales");
    const auto bias = read(folder + "/bias"), token_scales = read(folder + "/token_scales");
    std::vector<u8> y(m * n * 2 + 256, 0xFF);
    std::vector<float4> partials(ctas * 2 * PARTIAL / 16);
    std::vector<u32> arrivals(ctas * 8);
    problem = {x.data(), codes.data(), scales.data(), reinterpret_cast<const u16*>(bias.data()), y.data(), partials.data(),
               arrivals.data(), m, n, tiles_n, tiles_k, token_tiles, split, {static_cast<u32>(run), static_cast<u32>(longer)},
               reinterpret_cast<const float*>(token_scales.data())};
    for (int cta = 0; cta < ctas; ++cta) {
        blockIdx.x = backwards ? ctas - 1 - cta : cta;
        run_cta(backwards);
    }
    for (u32 count : arrivals)
        if (count) fail("a counter that is left behind");
    std::FILE* const file = std::fopen((folder + "/y").c_str(), "wb");
    std::fwrite(y.data(), 1, y.size(), file);
    std::fclose(file);
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """By tile and group."""
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder, made = tmp_path_factory.mktemp("emulated"), {}
    (folder / "common").mkdir()
    for name, text in (("types", TYPES), ("async_copy", COPIES), ("element", ELEMENTS)):
        (folder / "common" / f"{name}.cuh").write_text(text)

    def program(name, group):
        if (name, group) not in made:
            tile, path = TILES[name].for_group(group), folder / f"{name}-{group}"
            types = types_of(torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)
            sizes = f"constexpr int SHARED = {tile.shared_bytes(89)}, PARTIAL = {tile.partial_bytes};\n"
            kernel = f"#define KERNEL {tile.expression(89)}, {types}, {group}\n"
            path.with_suffix(".cpp").write_text(sizes + kernel + PROGRAM)
            include = [f"-I{folder}", f"-I{kernels_dir()}"]
            subprocess.run(["g++", "-std=c++17", "-O1", "-w", *include, "-o", path, path.with_suffix(".cpp")], check=True)
            made[name, group] = path
        return made[name, group]

    return program


def write(folder: Path, x, packed: PackedWeight, bias):
    """What the program reads."""
    rounded, token_scales = fp8_reference.round_tokens(x)
    tensors = {
        "x": fp8_reference.in_kernel_order(rounded.view(torch.uint8)),
        "codes": packed.codes,
        "scales": packed.scales,
        "bias": bias,
        "token_scales": token_scales,
    }
    for file, tensor in tensors.items():
        (folder / file).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def emulated(program: Path, folder: Path, way: Decomposition, sizes: tuple[int, ...], backwards: int):
    """y, and what lies behind it. `sizes`: those of the argument, from m on; `backwards`: the last CTA and lane come first."""
    m, n, _, steps, _ = sizes
    schedule = divmod(way.tiles * steps if way.stream_k else way.tiles, way.ctas)
    numbers = (*sizes, 0 if way.stream_k else 1, *schedule, way.ctas, backwards)
    subprocess.run([program, folder, *map(str, numbers)], check=True, timeout=300)
    found = torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.bfloat16)
    return found[: m * n].view(m, n), found[m * n :]


CASES = [  # rows, outputs, inputs, inputs that share a scale, SMs
    (1, 64, 128, 128, 1),
    (70, 330, 640, 128, 142),
    (130, 260, 384, 128, 4),
    (150, 200, 896, 128, 5),
    (66, 71, 512, 512, 3),
    (64, 256, 1024, 1024, 142),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize("name", TILES)
def test_the_source_multiplies(programs, name, case, tmp_path):
    m, n, k, group_size, sms = case
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.randn((n, k // group_size), generator=generator).half() * 0.02
    packed = pack(QuantizedLinear(codes, scales, group_size))
    x, bias = torch.randn((m, k), generator=generator).bfloat16(), torch.randn(n, generator=generator).bfloat16()
    x[0, 3] = 300
    write(tmp_path, x, packed, bias)
    tile, tiles_n = TILES[name], packed.codes.shape[0]
    token_tiles = -(-m // tile.tokens)
    way = decompose(tile, token_tiles * -(-tiles_n // tile.along_n), k // 128, sms, 89)
    program = programs(name, group_of(packed.codes, packed.scales))
    for backwards in (0, 1):
        y, behind = emulated(program, tmp_path, way, (m, n, tiles_n, k // 128, token_tiles), backwards)
        error = (y.double() - fp8_reference.exact(x, packed, bias)).abs()
        assert (error <= fp8_reference.error_bound(x, packed, bias)).all()
        assert behind.isnan().all()
