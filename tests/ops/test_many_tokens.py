"""`kernels/w24a16/many.cuh`, compiled for the host: every product gets its weights, and keeps them while it runs.

Threads are run one by one. A product is noted when it is issued and looked at again when a wait says that it is done, which is
as late as the tensor cores may read its registers. Slots of the ring are overwritten as soon as they are released.
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
struct Stretch {};
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
    struct Scales { u32 pair; void set(u32 value, u32) { pair = value; } };
    static void dequantize(u32 q, u32 (&a)[4]) { a[0] = q; a[1] = 0; }
    static void weights(u32 q, const Scales& s, u32 (&a)[4]) { a[0] = q; a[1] = s.pair; }
};

template <int kTokens_, int kWarpgroups_, int kTiles_, int kSlots_> struct Tile {
    static constexpr int kTokens = kTokens_, kTiles = kTiles_, kSlots = kSlots_, kBlockTiles = kWarpgroups_ * kTiles_;
    static constexpr int kWarps = 4 * kWarpgroups_, kFragments = kTokens / 8;
    static constexpr int kBoxBytes = kTokens * 128, kCodesAt = 2 * kBoxBytes;
    static constexpr int kSlotBytes = kCodesAt + kBlockTiles * kSparseTile, kScalesAt = kSlots * kSlotBytes;
    static constexpr int kSlotScaleBytes = kBlockTiles * kScaleBytes;
    static u32 full(u32, u32 slot) { return slot; }
    static u32 empty(u32, u32 slot) { return slot; }
};

template <class T> struct Place {
    u32 slot = 0, parity = 0;
    void advance() { if (++slot == T::kSlots) { slot = 0; parity ^= 1; } }
    u32 slot_before() const { return (slot == 0 ? T::kSlots : slot) - 1; }
};

template <class T> struct HopperWarp {
    struct { u32 minus_eight_shrunk; } p;
    u8* const memory;
    const int warp, lane, tile, fragment;
    Place<T> place;
    float sums[T::kTiles][T::kFragments][4];
    HopperWarp(u8* at, int w, int l) : memory(at), warp(w), lane(l), tile(w * T::kTiles / 4), fragment(w * T::kTiles % 4) {}
};

template <class T, class E, bool kGrouped> struct SparseWarp : HopperWarp<T> {
    using HopperWarp<T>::HopperWarp;
    void finish(const Stretch&) {}
};

inline void __syncwarp() {}
inline u32 shared_address(const void*) { return 0; }
inline u64 swizzled_descriptor(u32 shared) { return shared / 16; }
inline void barrier_wait_if(bool wanted, u32 slot, u32 parity) { on_wait(wanted, slot, parity); }
inline void barrier_arrive(u32 slot) { on_release(slot); }
inline void barrier_arrive_if(bool wanted, u32 slot) { if (wanted) on_release(slot); }
"""

PROGRAM = """
#include "w24a16/many.cuh"
using T = TILE;
constexpr int kGroups[] = {1, 2, 7, 1};  // of the stretches
u8 memory[T::kScalesAt + T::kSlots * T::kSlotScaleBytes];
u32 arrived, released;

u32 content(u32 group, u32 at) { return (group * 2654435761u) ^ (at * 40503u + 12345u); }  // of a slot: codes, then scales
u32 word(u32 group, u32 offset) { return content(group, offset / 4); }

void write(u32 slot, u32 group) {
    for (u32 at = 0; at < T::kBlockTiles * kSparseTile; at += 4) {
        const u32 value = word(group, at);
        std::memcpy(memory + slot * T::kSlotBytes + T::kCodesAt + at, &value, 4);
    }
    for (u32 at = 0; at < T::kSlotScaleBytes; at += 4) {
        const u32 value = word(group, T::kBlockTiles * kSparseTile + at);
        std::memcpy(memory + T::kScalesAt + slot * T::kSlotScaleBytes + at, &value, 4);
    }
}

void wait(bool wanted, u32 slot, u32 parity) {
    if (!wanted) return;
    require(slot == arrived % T::kSlots && parity == arrived / T::kSlots % 2, "waits for another slot than the next");
    write(slot, arrived++);
}

void release(u32 slot) {
    require(slot == released++ % T::kSlots, "releases another slot than the oldest");
    for (const auto& products : running)
        for (const Product& p : products) require(p.box * 16 / T::kSlotBytes != slot, "releases a slot that is read");
    write(slot, 99);
}

template <bool kGrouped> void run(int warp, int lane) {
    std::memset(memory, 0, sizeof memory);
    arrived = released = 0;
    on_wait = wait, on_release = release;
    static ManyTokens<T, Element, kGrouped>* m;
    m = new ManyTokens<T, Element, kGrouped>(memory, warp, lane);
    wait(true, 0, 0);
    m->begin();
    u32 group = 0;
    for (u32 s = 0; s < 4; ++s) {
        for (int left = kGroups[s]; left > 0; --left) m->multiply(left > 1 || s < 3);
        warpgroup_wait<0>();
        m->finish(Stretch{});
        require(done.size() == static_cast<size_t>(4 * T::kTiles * kGroups[s]), "number of products");
        std::vector<int> seen(4 * T::kTiles * kGroups[s]);
        for (const Product& p : done) {
            const u32 slot = p.box * 16 / T::kSlotBytes, at = p.box * 16 % T::kSlotBytes;
            const u32 half = at / T::kBoxBytes, j = at % T::kBoxBytes / 64;
            const int r = static_cast<const float(*)[T::kFragments][4]>(p.sums) - m->sums, i = m->fragment + r;
            const u32 g = group + (&p - done.data()) / (4 * T::kTiles);
            require(slot == g % T::kSlots && static_cast<int>(j) == p.selector, "activations");
            require(!seen[((g - group) * T::kTiles + r) * 4 + half * 2 + j]++, "a product twice");
            const u32 packed = m->tile * kSparseTile + half * kSparseHalf + lane * 16;
            require(p.codes == word(g, packed + i / 2 * 512 + i % 2 * 8 + j * 4), "codes");
            require(p.places == word(g, packed + kKeptBytes + i * 4), "positions");
            const u32 factors = T::kBlockTiles * kSparseTile + m->tile * kScaleBytes + lane / 4 * 16 + i * 4;
            require(p.scales == (kGrouped ? word(g, factors) : 0), "scales");
        }
        done.clear();
        group += kGroups[s];
    }
    require(arrived == group && (lane != 0 || released == group), "number of slots");
    delete m;
}

int main() {
    for (int warp = 0; warp < T::kWarps; ++warp)
        for (int lane : {0, 1, 5, 30, 31}) {
            run<true>(warp, lane);
            run<false>(warp, lane);
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
