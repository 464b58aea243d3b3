"""How the Hopper kernel's work is cut: `HopperWork` of `hopper_work.cuh`, compiled for the host, must do every step once."""

import shutil
import subprocess

import pytest

from marlin_tools.ops.linear.decomposition import Costs, best, decompositions, estimate
from marlin_tools.resources import kernels_dir

CLUSTERS = {2: 66, 3: 40, 4: 32, 5: 24, 6: 20, 7: 16, 8: 16}
CASES = [
    (tiles, groups, sms)
    for tiles in (1, 2, 16, 43, 96, 131, 132, 133, 265, 700)
    for groups in (1, 2, 7, 32)
    for sms in (1, 66, 132)
]

# What the header takes from CUDA and from the headers that it includes.
STUBS = {
    "common/tma.cuh": """
        #pragma once
        #define __device__
        #define __forceinline__ inline
        using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned; using u64 = unsigned long long;
        struct TensorMap { u64 opaque[16]; }; struct float4 { float x, y, z, w; };
    """,
    "linear/problem.cuh": f'#define WORK_INLINE\n#include "{kernels_dir()}/linear/work_range.cuh"\n',
}
PROGRAM = """
#include <cstdio>
#include "linear/hopper_work.cuh"
void walk(const HopperProblem& p, unsigned ctas) {
    for (unsigned cta = 0; cta < ctas; ++cta)
        for (HopperWork s = HopperWork::first(p, cta, ctas);; s.next(p, ctas)) {
            std::printf("%u %u %d %d\\n", cta, s.tile, s.begin, s.end);
            if (!s.more(p)) break;
        }
    std::printf("end\\n");
}
int main() {
    HopperProblem p = {};
    unsigned ctas, steps;
    while (std::scanf("%u %d %d %d %d", &ctas, &p.split, &p.tiles, &p.shared_tiles, &p.tiles_k) == 5) {
        p.token_tiles = 1;
        steps = p.shared_tiles * p.tiles_k;
        p.schedule = Schedule{steps / ctas, steps % ctas};
        walk(p, ctas);
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder = tmp_path_factory.mktemp("work")
    for name, text in STUBS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "main.cpp").write_text(PROGRAM)
    includes = [f"-I{folder}", f"-I{kernels_dir()}"]
    subprocess.run(["g++", "-std=c++17", *includes, "-o", folder / "main", folder / "main.cpp"], check=True)
    return folder / "main"


def test_every_step_once(program):
    asked = [(d, case[1]) for case in CASES for d in decompositions(*case, CLUSTERS)]
    lines = "".join(f"{d.ctas} {d.split} {d.tiles} {d.shared_tiles} {groups}\n" for d, groups in asked)
    out = subprocess.run([program], input=lines, check=True, capture_output=True, text=True).stdout
    answers = out.split("end\n")[:-1]
    assert len(answers) == len(asked)
    for (d, groups), answer in zip(asked, answers, strict=True):
        done: dict[tuple[int, int], int] = {}
        parts: dict[int, list[tuple[int, int]]] = {}
        for line in answer.splitlines():
            cta, tile, begin, end = map(int, line.split())
            assert 0 <= begin < end <= groups, (d, line)
            for group in range(begin, end):
                assert (tile, group) not in done
                done[tile, group] = cta
            if end - begin < groups:
                parts.setdefault(tile, []).append((cta, begin))
        assert set(done) == {(tile, group) for tile in range(d.tiles) for group in range(groups)}
        assert all(tile < d.shared_tiles for tile in parts)  # where partial sums are looked for
        if d.split > 1:
            assert set(parts) == set(range(d.shared_tiles))
            assert all({cta // d.split for cta, _ in found} == {tile} for tile, found in parts.items())  # one cluster


def test_a_cta_leaves_at_most_two_partial_sums(program):
    for tiles, groups, sms in CASES:
        d = decompositions(tiles, groups, sms, {})[-1]
        asked = f"{d.ctas} 1 {d.tiles} {d.shared_tiles} {groups}\n"
        out = subprocess.run([program], input=asked, check=True, capture_output=True, text=True)
        kinds = [
            (cta, begin == "0")
            for cta, _, begin, end in (line.split() for line in out.stdout.splitlines()[:-1])
            if int(end) - int(begin) < groups
        ]
        assert len(kinds) == len(set(kinds))


def cheapest(tiles, clusters, costs):
    return best(decompositions(tiles, 32, 132, clusters), 32, costs)


def test_the_cheapest_way_is_taken():
    free, dear = Costs(shared=0, split=0), Costs(shared=1000, split=1000)

    assert cheapest(96, {}, free).shared_tiles == 96
    assert cheapest(96, {}, dear).shared_tiles == 0
    assert cheapest(32, {4: 32}, Costs(shared=9, split=1)).split == 4
    assert cheapest(32, {2: 66, 4: 32}, Costs(shared=99, split=0, split_each=5)).split == 2  # 16 + 10 against 8 + 20
    assert cheapest(264, {}, free).shared_tiles == 0  # two rounds that nobody idles in
    assert cheapest(300, {}, free).shared_tiles == 168  # one whole round, the rest shared
    assert estimate(cheapest(264, {}, free), 32, dear) == 64


def test_sharing_out_pays_less_where_activations_are_read_again():
    choices = decompositions(256, 224, 132, {})

    assert best(choices, 224, Costs(shared=10, split=0)).shared_tiles == 256  # 435 steps instead of 448
    assert best(choices, 224, Costs(shared=10, split=0, shared_step=1.1)).shared_tiles == 0
