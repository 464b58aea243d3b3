"""Where the copy engine puts activations and where the tensor cores look for them: the 128-byte swizzle, seen from both sides.

Both permute 16-byte pieces by the address: bits 4 to 6 are XORed with bits 7 to 9. The engine fills boxes of rows x 64 inputs;
the matrix descriptor of `warpgroup.cuh` names units of eight rows, 1 KB apart, and is moved by 32 bytes per 16 inputs.
"""

import re

import pytest

from marlin_tools.ops.linear.tiles import TILES
from marlin_tools.resources import kernels_dir

UNIT = 1024


def swizzle(address):
    return address ^ (address >> 7 & 7) << 4


def box(base, rows):
    """Byte address -> (row, input), as the engine writes a box."""
    return {swizzle(base + row * 128 + column * 2): (row, column) for row in range(rows) for column in range(64)}


def operand(descriptor, rows):
    """(row, input) of a k16 step -> byte address, as the tensor cores read it."""
    start, unit = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 62 == 1  # 128-byte swizzle
    return {
        (row, column): swizzle(start + row // 8 * unit + row % 8 * 128 + column * 2)
        for row in range(rows)
        for column in range(16)
    }


def descriptor(shared):
    """`swizzled_descriptor`, from its source."""
    text = (kernels_dir() / "common/warpgroup.cuh").read_text()
    (body,) = re.findall(r"swizzled_descriptor\(u32 shared\) \{\s*return (.+?);", text, re.DOTALL)
    python = re.sub(r"static_cast<u64>\((.+?)\)", r"(\1)", body).replace("ull", "")
    return eval(python, {"shared": shared})  # noqa: S307 - an expression of our own source


@pytest.mark.parametrize("tokens", sorted({tile.tokens for tile in TILES.values() if tile.kernel == "hopper"}))
def test_tensor_cores_find_what_the_engine_wrote(tokens):
    box_bytes = tokens * 128
    for base in (0, 3 * UNIT, 190 * UNIT):
        written = {**box(base, tokens), **{a: (r, c + 64) for a, (r, c) in box(base + box_bytes, tokens).items()}}
        assert len(written) == tokens * 128
        for step in range(8):
            moved = descriptor(base) + (step // 4 * box_bytes + step % 4 * 32) // 16
            for (row, column), address in operand(moved, tokens).items():
                assert written[address] == (row, step * 16 + column)


def test_eight_rows_of_a_piece_fall_into_different_banks():
    for piece in range(8):
        assert len({swizzle(row * 128 + piece * 16) // 16 % 8 for row in range(8)}) == 8
