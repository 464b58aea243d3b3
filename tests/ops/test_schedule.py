"""`kernels/linear/work_range.cuh`, compiled for the host where there is a compiler and modelled in Python everywhere."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_tools.resources import kernels_dir


def first_step(steps, blocks, block):
    run, longer = divmod(steps, blocks)
    return block * run + min(block, longer)


def block_of(steps, blocks, step):
    """By looking, not by dividing."""
    return next(b for b in range(blocks) if first_step(steps, blocks, b) <= step < first_step(steps, blocks, b + 1))


def segments(tiles, groups, blocks, slot):
    """What the blocks do, as the main loop of the kernel walks it: (block, tile, first group, groups, begins, ends)."""
    steps = tiles * groups
    for block in range(blocks):
        begin, end = first_step(steps, blocks, block), first_step(steps, blocks, block + 1)
        tile, group, left = begin // groups, begin % groups, end - begin
        opened, begins = group, group == 0
        while left:
            count = min(groups - group, slot, left)
            assert count > 0
            group, left = group + count, left - count
            if group == groups or not left:
                yield block, tile, opened, group - opened, begins, group == groups
                tile, group, opened, begins = tile + 1, 0, 0, True


@settings(max_examples=200, deadline=None)
@given(tiles=st.integers(1, 40), groups=st.integers(1, 40), blocks=st.integers(1, 140), slot=st.sampled_from([1, 2, 4]))
def test_every_step_once_and_every_arrival_expected(tiles, groups, blocks, slot):
    blocks = max(1, min(blocks, tiles * groups // slot))
    done, arrivals, places = set(), {}, set()
    for block, tile, opened, count, begins, ends in segments(tiles, groups, blocks, slot):
        for group in range(opened, opened + count):
            assert (tile, group) not in done
            done.add((tile, group))
        if not (begins and ends):
            arrivals.setdefault(tile, []).append(block)
            assert (block, begins) not in places  # a partial sum has its place to itself
            places.add((block, begins))
            assert begins == (block == block_of(tiles * groups, blocks, tile * groups))  # where the reader looks for it
    assert len(done) == tiles * groups
    counters = set()
    for tile, blocks_seen in arrivals.items():
        first = block_of(tiles * groups, blocks, tile * groups)
        last = block_of(tiles * groups, blocks, tile * groups + groups - 1)
        assert sorted(blocks_seen) == list(range(first, last + 1))
        assert first not in counters  # and so has a tile its counter
        counters.add(first)


def test_runs_differ_by_one_step_at_most():
    for steps, blocks in ((512, 132), (1536, 132), (14336, 132), (131, 7)):
        lengths = {first_step(steps, blocks, b + 1) - first_step(steps, blocks, b) for b in range(blocks)}
        assert max(lengths) - min(lengths) <= 1


PROGRAM = """
#include <cstdio>
#include <cstdlib>
#define WORK_INLINE
#include "work_range.cuh"
int main(int, char** argv) {
    const unsigned steps = std::atoi(argv[1]), blocks = std::atoi(argv[2]);
    const Schedule s{steps / blocks, steps % blocks};
    for (unsigned b = 0; b <= blocks; ++b) std::printf("%u\\n", s.first_step(b));
    for (unsigned i = 0; i < steps; ++i) std::printf("%u\\n", s.cta_of(i));
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no host compiler")
def test_header_agrees_with_the_model(tmp_path):
    program = tmp_path / "check"
    program.with_suffix(".cpp").write_text(PROGRAM)
    include = f"-I{kernels_dir() / 'linear'}"
    subprocess.run(["g++", "-std=c++17", include, "-o", program, program.with_suffix(".cpp")], check=True)
    for steps, blocks in ((1, 1), (7, 7), (31, 8), (512, 132), (1536, 132), (133, 132), (1024, 1024)):
        out = subprocess.run([program, str(steps), str(blocks)], check=True, capture_output=True, text=True).stdout

        firsts = [first_step(steps, blocks, b) for b in range(blocks + 1)]
        owners = [block_of(steps, blocks, step) for step in range(steps)]
        assert [int(line) for line in out.split()] == firsts + owners
