"""The packed layout against the fragment tables of the PTX manual, written down a second time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_tools.ops.linear import layout
from marlin_tools.quantized import QuantizedLinear


def random_weight(n, k, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.randn((n, k // group_size), generator=generator).to(torch.float16)
    return QuantizedLinear(codes, scales, group_size)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), tiles=st.integers(1, 4), group=st.sampled_from((*layout.GROUP_SIZES, 0)), seed=st.integers(0, 99))
def test_unpack_inverts_pack(n, tiles, group, seed):
    k = 128 * tiles
    weight = random_weight(n, k, group or k, seed)

    packed = layout.pack(weight)
    back = layout.unpack(packed)

    assert packed.codes.shape == (-(-n // 64), tiles, 1024)
    assert packed.scales.shape == (-(-n // 64), k // (group or k), 64)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.group_size == weight.group_size


def fragment_a(lane, register, element):
    """mma.m16n8k16, operand A, 16-bit types (PTX ISA, matrix fragments): row and column of one element."""
    group_id, thread_in_group = lane >> 2, lane % 4
    row = group_id if register in {0, 2} else group_id + 8
    column = thread_in_group * 2 + element + (8 if register in {2, 3} else 0)
    return row, column


def test_every_word_is_one_a_fragment():
    weight = random_weight(128, 256, 128)
    words = layout.pack(weight).codes.view(2, 2, 2, 4, 32, 4)
    seen = set()
    for tile, group, jj, i, lane, j in torch.cartesian_prod(*(torch.arange(s) for s in words.shape)).tolist():
        if (tile, group) == (0, 1):
            continue  # three of the four tiles show where a tile lies
        word = words[tile, group, jj, i, lane, j].item() & 0xFFFFFFFF
        for register in range(4):
            for element in range(2):
                row, column = fragment_a(lane, register, element)
                h, g = divmod(row, 8)
                n = tile * 64 + 8 * g + 2 * i + h
                k = group * 128 + jj * 64 + j * 16 + column
                assert word >> 4 * (register + 4 * element) & 15 == weight.codes[n, k].item()
                seen.add((n, k))
    assert len(seen) == 3 * 64 * 128


def test_scales_of_narrow_groups_lie_row_by_row():
    """A packed tile's rows are one piece of memory, in the order of its inputs."""
    weight = random_weight(128, 256, 32)
    rows = layout.pack(weight).scales.view(2, 2, 4, 64)  # [tile, packed tile along K, row, output]
    for tile, along, row in ((0, 0, 0), (0, 1, 2), (1, 0, 3), (1, 1, 1)):
        assert torch.equal(rows[tile, along, row], weight.scales[64 * tile : 64 * tile + 64, 4 * along + row])


def test_a_lane_owns_eight_neighboring_outputs():
    for g in range(8):
        outputs = [8 * g + 2 * i + h for i in range(4) for h in range(2)]
        assert outputs == list(range(8 * g, 8 * g + 8))


def test_padding_is_zero_weight():
    packed = layout.pack(random_weight(65, 128, 128))
    full = layout.unpack(layout.PackedWeight(packed.codes, packed.scales, 128, packed.exponent))

    assert (full.codes[65:] == 8).all()
    assert (full.scales[65:] == 0).all()


@pytest.mark.parametrize(
    ("k", "group_size", "words"), [(192, 64, "multiple of 128"), (256, 16, "group_size 16"), (512, 256, "group_size 256")]
)
def test_refuses_what_the_kernels_cannot_hold(k, group_size, words):
    with pytest.raises(ValueError, match=words):
        layout.pack(random_weight(64, k, group_size))


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (0.0, 8),
        (2.0**-24, -12),
        (0.0009, -2),
        (0.001, 8),
        (-0.0079, 8),
        (0.999, 8),
        (1.0, 12),
        (15.99, 12),
        (16.0, 13),
        (65504.0, 24),
    ],
)
def test_exponents_keep_factors_finite(largest, exponent):
    scales = torch.tensor([0.0, largest / 2, largest, float("nan"), float("-inf")], dtype=torch.float16)

    assert layout.exponent_of(scales) == exponent

    assert scales[:3].abs().max().item() * 2.0 ** (24 - exponent) <= 65504


def test_packing_knows_the_exponent():
    weight = random_weight(64, 256, 128)
    assert layout.pack(weight).exponent == layout.exponent_of(weight.scales) == 12


def test_sizes_on_the_device():
    packed = layout.pack(random_weight(128, 512, 128))

    assert packed.codes.numel() * 4 == 128 * 512 // 2
    assert packed.scales.numel() * 2 == 128 * 512 // 128 * 2
    assert (packed.in_features, packed.out_features, packed.group_size) == (512, 128, 128)
