"""`kernels/w24a16/many.cuh`, compiled for the host: every product gets its weights, and keeps them while it runs.

Threads are run one by one. A product is noted when it is issued and looked at again when a wait says that it is done, which is
as late as the tensor cores may read its registers. Stages of the pipeline are overwritten as soon as they are released.
"""

import shutil
import subprocess

import pytest

from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES
from marlin_tools.resources import kernels_dir

TILES = {name: tile for name, tile in SPARSE_TILES.items() if tile.rounded}

# What `many.cuh` takes from the headers that it includes. A conversion leaves what it was given, to be recognised.
STUBS = """
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>
#define __device__
#define __forceinline__ inline
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned; using u64 = unsigned long long;
struct alignas(16) Vec16 { u32 word[4]; };
struct uint2 { u32 x, y; };
struct HopperWork {};
constexpr int kKeptBytes = 1024, kSparseHalf = 1536, kSparseTile = 3072, kScaleBytes = 128;

inline void require(bool right, const char* what) { if (!right) { std::printf("%s\\n", what); std::exit(1); } }

struct Product { const u32 *a, *positions; u32 codes, scales, places; int selector; u64 box; const void* sums; };
inline std::vector<Product> batch, done;
inline std::deque<std::vector<Product>> running;
inline void (*on_wait)(bool, u32, u32), (*on_release)(u32);

inline void warpgroup_fence() {}
inline void warpgroup_commit() { running.push_back(batch); batch.clear(); }
template <int kPending> void warpgroup_wait() {
    for (; running.size() > kPending; running.pop_front())
        for (const Product& p : running.front()) {
            require(p.a[0] == p.codes && p.a[1] == p.scales, "weights changed under a product");
            require(*p.positions == p.places, "positions changed under a product");
            done.push_back(p);
        }
}

template <class E, int kTokens> struct SparseWarpgroup {
    template <int kSelector>
    static void multiply(float (&d)[kTokens / 8][4], const u32 (&a)[4], u64 b, const u32& positions, bool add) {
        require(add, "sums are replaced");
        batch.push_back({a, &positions, a[0], a[1], positions, kSelector, b, d});
    }
};

struct Element {
    struct Scales { u32 pair; };
    using Operand = Element;
    static void set(Scales& scales, u32 value, u32) { scales.pair = value; }
    static void dequantize(u32 q, u32 (&a)[4]) { a[0] = q; a[1] = 0; }
    static void weights(u32 q, const Scales& s, u32 (&a)[4]) { a[0] = q; a[1] = s.pair; }
};

template <int kTokens_, int kConsumers_, int kTiles_, int kStages_> struct Tile {
    static constexpr int kTokens = kTokens_, kTiles = kTiles_, kStages = kStages_, kCtaTiles = kConsumers_ * kTiles_;
    static constexpr int kConsumerWarps = 4 * kConsumers_, kFragments = kTokens / 8;
    static constexpr int kBoxBytes = kTokens * 128, kCodesAt = 2 * kBoxBytes;
    static constexpr int kStageBytes = kCodesAt + kCtaTiles * kSparseTile, kScalesAt = kStages * kStageBytes;
    static constexpr int kStageScaleBytes = kCtaTiles * kScaleBytes;
    static u32 full(u32, u32 stage) { return stage; }
    static u32 empty(u32, u32 stage) { return stage; }
};

template <class T> struct PipelineState {
    u32 stage = 0, phase = 0;
    void advance() { if (++stage == T::kStages) { stage = 0; phase ^= 1; } }
    u32 stage_before() const { return (stage == 0 ? T::kStages : stage) - 1; }
};

template <class T> struct ConsumerWarp {
    struct { u32 offset_per_scale; } p;
    u8* const memory;
    const int warp, lane, tile, fragment;
    PipelineState<T> state;
    float sums[T::kTiles][T::kFragments][4];
    ConsumerWarp(u8* at, int w, int l) : memory(at), warp(w), lane(l), tile(w * T::kTiles / 4), fragment(w * T::kTiles % 4) {}
};

template <class T, class E, int kGroup> struct SparseConsumer : ConsumerWarp<T> {
    using ConsumerWarp<T>::ConsumerWarp;
    void epilogue(const HopperWork&) {}
};

inline void __syncwarp() {}
inline u32 shared_address(const void*) { return 0; }
inline u64 swizzled_descriptor(u32 shared) { return shared / 16; }
inline void barrier_wait_if(bool wanted, u32 stage, u32 parity) { on_wait(wanted, stage, parity); }
inline void barrier_arrive(u32 stage) { on_release(stage); }
inline void barrier_arrive_if(bool wanted, u32 stage) { if (wanted) on_release(stage); }
"""

PROGRAM = """
#include "w24a16/many.cuh"
using T = TILE;
constexpr int kGroups[] = {1, 2, 7, 1};  // of the stretches
u8 memory[T::kScalesAt + T::kStages * T::kStageScaleBytes];
u32 arrived, released;

u32 content(u32 group, u32 at) { return (group * 2654435761u) ^ (at * 40503u + 12345u); }  // of a stage: codes, then scales
u32 word(u32 group, u32 offset) { return content(group, offset / 4); }

void write(u32 stage, u32 group) {
    for (u32 at = 0; at < T::kCtaTiles * kSparseTile; at += 4) {
        const u32 value = word(group, at);
        std::memcpy(memory + stage * T::kStageBytes + T::kCodesAt + at, &value, 4);
    }
    for (u32 at = 0; at < T::kStageScaleBytes; at += 4) {
        const u32 value = word(group, T::kCtaTiles * kSparseTile + at);
        std::memcpy(memory + T::kScalesAt + stage * T::kStageScaleBytes + at, &value, 4);
    }
}

void wait(bool wanted, u32 stage, u32 parity) {
    if (!wanted) return;
    require(stage == arrived % T::kStages && parity == arrived / T::kStages % 2, "waits for another stage than the next");
    write(stage, arrived++);
}

void release(u32 stage) {
    require(stage == released++ % T::kStages, "releases another stage than the oldest");
    for (const auto& products : running)
        for (const Product& p : products) require(p.box * 16 / T::kStageBytes != stage, "releases a stage that is read");
    write(stage, 99);
}

template <int kGroup> void run(int warp, int lane) {
    std::memset(memory, 0, sizeof memory);
    arrived = released = 0;
    on_wait = wait, on_release = release;
    static ManyTokens<T, Element, kGroup>* m;
    m = new ManyTokens<T, Element, kGroup>(memory, warp, lane);
    wait(true, 0, 0);
    m->begin();
    u32 group = 0;
    for (u32 s = 0; s < 4; ++s) {
        for (int left = kGroups[s]; left > 0; --left) m->multiply(left > 1 || s < 3);
        warpgroup_wait<0>();
        m->epilogue(HopperWork{});
        require(done.size() == static_cast<size_t>(4 * T::kTiles * kGroups[s]), "number of products");
        std::vector<int> seen(4 * T::kTiles * kGroups[s]);
        for (const Product& p : done) {
            const u32 stage = p.box * 16 / T::kStageBytes, at = p.box * 16 % T::kStageBytes;
            const u32 half = at / T::kBoxBytes, j = at % T::kBoxBytes / 64;
            const int r = static_cast<const float(*)[T::kFragments][4]>(p.sums) - m->sums, i = m->fragment + r;
            const u32 g = group + (&p - done.data()) / (4 * T::kTiles);
            require(stage == g % T::kStages && static_cast<int>(j) == p.selector, "activations");
            require(!seen[((g - group) * T::kTiles + r) * 4 + half * 2 + j]++, "a product twice");
            const u32 packed = m->tile * kSparseTile + half * kSparseHalf + lane * 16;
            require(p.codes == word(g, packed + i / 2 * 512 + i % 2 * 8 + j * 4), "codes");
            require(p.places == word(g, packed + kKeptBytes + i * 4), "positions");
            const u32 factors = T::kCtaTiles * kSparseTile + m->tile * kScaleBytes + lane / 4 * 16 + i * 4;
            require(p.scales == (kGroup ? word(g, factors) : 0), "scales");
        }
        done.clear();
        group += kGroups[s];
    }
    require(arrived == group && (lane != 0 || released == group), "number of stages");
    delete m;
}

int main() {
    for (int warp = 0; warp < T::kConsumerWarps; ++warp)
        for (int lane : {0, 1, 5, 30, 31}) {
            run<128>(warp, lane);
            run<0>(warp, lane);
        }
}
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder = tmp_path_factory.mktemp("many")
    (folder / "w24a16").mkdir()
    (folder / "w24a16" / "outputs.cuh").write_text(STUBS)
    (folder / "main.cpp").write_text(PROGRAM)
    # A quoted include looks beside the including file first, where the real one is.
    (folder / "w24a16" / "many.cuh").write_text((kernels_dir() / "w24a16" / "many.cuh").read_text())
    return folder


@pytest.mark.parametrize("name", TILES)
def test_products_get_their_weights_and_keep_them(headers, name):
    tile = TILES[name]
    types = f"-DTILE=Tile<{tile.tokens},{tile.consumers},{tile.along_n // tile.consumers},{tile.stages(90)}>"
    program = headers / name
    command = ["g++", "-std=c++17", "-O1", "-w", types, f"-I{headers}", "-o", program, headers / "main.cpp"]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
