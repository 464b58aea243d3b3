"""The packed layout of 2:4-sparse weights against the tables of the PTX manual, written down a second time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_tools.ops.linear import sparse_layout
from marlin_tools.quantized import ZERO, QuantizedLinear


def sparse_weight(n, k, group_size, seed=0):
    """At most two nonzeros in each quad, often fewer: kept codes are drawn from all 16, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
    dropped = torch.rand(codes.shape, generator=generator).argsort(dim=2)[..., :2]
    codes.scatter_(2, dropped, ZERO)
    scales = torch.randn((n, k // group_size), generator=generator).to(torch.float16)
    return QuantizedLinear(codes.view(n, k), scales, group_size)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), groups=st.integers(1, 4), per_column=st.booleans(), seed=st.integers(0, 99))
def test_unpack_inverts_pack(n, groups, per_column, seed):
    weight = sparse_weight(n, 128 * groups, 128 * groups if per_column else 128, seed)

    packed = sparse_layout.pack_sparse(weight)
    back = sparse_layout.unpack_sparse(packed)

    assert packed.codes.shape == (-(-n // 64), groups, 768)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.group_size == weight.group_size


def fragment_a(lane, register):
    """mma.sp.m16n8k32, operand A, 16-bit types: row, and first of the four columns of which a register holds two elements."""
    group_id, thread_in_group = lane >> 2, lane % 4
    row = group_id if register in {0, 2} else group_id + 8
    return row, thread_in_group * 4 + (16 if register in {2, 3} else 0)


def metadata(words, selector, row, column):
    """Positions of the two elements kept among columns column..column+3, from the 32 lanes' metadata operands.

    m16n8k32, 16-bit types: of each four lanes two contribute, 0 and 1 with selector 0, else 2 and 3: the first of them columns
    0 to 15, the second 16 to 31; the low half of its word belongs to row g, the high half to row g + 8, with g = lane / 4.
    """
    lane = row % 8 * 4 + selector * 2 + column // 16
    bits = words[lane] >> (16 if row >= 8 else 0) >> column % 16
    return bits & 3, bits >> 2 & 3


def test_every_word_is_a_sparse_fragment():
    weight = sparse_weight(128, 256, 128)
    tiles = sparse_layout.pack_sparse(weight).codes.view(2, 2, 2, 384)
    seen = 0
    for tile, group, jj, i, j in itertools.product(range(2), range(2), range(2), range(4), range(2)):
        half = tiles[tile, group, jj].tolist()
        kept = torch.tensor(half[:256]).view(2, 32, 2, 2)[i // 2, :, i % 2, j].tolist()
        positions = [word & 0xFFFFFFFF for word in torch.tensor(half[256:]).view(32, 4)[:, i].tolist()]
        for lane, register in itertools.product(range(32), range(4)):
            row, column = fragment_a(lane, register)
            h, g = divmod(row, 8)
            n, k = tile * 64 + 8 * g + 2 * i + h, group * 128 + jj * 64 + j * 32 + column
            where = metadata(positions, j, row, column)
            assert where[0] < where[1]  # ordered_metadata asks for it
            quad = [ZERO] * 4
            for element in range(2):
                quad[where[element]] = kept[lane] >> 4 * (register + 4 * element) & 15
            assert quad == weight.codes[n, k : k + 4].tolist()
            seen += 4
    assert seen == 128 * 256


def test_all_patterns_of_a_quad():
    """Every choice of kept positions, with every pair of codes: what comes back is what went in."""
    rows = []
    for first, second in itertools.combinations(range(4), 2):
        for a, b in itertools.product(range(16), range(16)):
            quad = [ZERO] * 4
            quad[first], quad[second] = a, b
            rows.append(quad)
    codes = torch.tensor(rows, dtype=torch.uint8).view(12, 512)
    weight = QuantizedLinear(codes, torch.ones((12, 4), dtype=torch.float16), 128)
    assert torch.equal(sparse_layout.unpack_sparse(sparse_layout.pack_sparse(weight)).codes, codes)


def test_kept_positions_are_the_nonzeros_and_then_the_first_zeros():
    for nonzero in range(16):
        ones = [i for i in range(4) if nonzero >> i & 1]
        if len(ones) > 2:
            assert sparse_layout.POSITIONS[nonzero] == 15
            continue
        kept = {sparse_layout.POSITIONS[nonzero] & 3, sparse_layout.POSITIONS[nonzero] >> 2}
        assert len(kept) == 2
        assert kept >= set(ones)
        filled = kept - set(ones)
        assert not filled or max(filled) <= min(set(range(4)) - kept)


def test_padding_is_zero_weight():
    packed = sparse_layout.pack_sparse(sparse_weight(65, 128, 128))
    full = sparse_layout.unpack_sparse(sparse_layout.PackedSparse(packed.codes, packed.scales, 128, packed.exponent))

    assert (full.codes[65:] == ZERO).all()
    assert (full.scales[65:] == 0).all()


def test_three_nonzeros_are_refused_by_place():
    codes = sparse_weight(1100, 256, 128).codes.clone()
    codes[1050, 132:136] = torch.tensor([1, ZERO, 3, 4])
    weight = QuantizedLinear(codes, torch.ones((1100, 2), dtype=torch.float16), 128)
    with pytest.raises(ValueError, match=r"output 1050 has more than two nonzeros in inputs 132\.\.135"):
        sparse_layout.pack_sparse(weight)


@pytest.mark.parametrize(("k", "group_size", "words"), [(192, 64, "multiple of 128"), (256, 64, "group_size 64")])
def test_refuses_what_the_kernels_cannot_hold(k, group_size, words):
    with pytest.raises(ValueError, match=words):
        sparse_layout.pack_sparse(sparse_weight(64, k, group_size))


def test_sizes_on_the_device():
    packed = sparse_layout.pack_sparse(sparse_weight(128, 512, 128))

    assert packed.codes.numel() * 4 == 128 * 512 * 3 // 8
    assert packed.scales.numel() * 2 == 128 * 512 // 128 * 2
    assert (packed.in_features, packed.out_features, packed.group_size) == (512, 128, 128)


@pytest.mark.parametrize("per_column", [False, True])
def test_random_weights_are_legal(per_column):
    packed = sparse_layout.random_sparse(100, 256, "cpu", per_column=per_column)
    weight = sparse_layout.unpack_sparse(packed)

    assert weight.shape == (100, 256)
    assert weight.is_2_4()
    assert weight.group_size == (256 if per_column else 128)
    assert (weight.codes != ZERO).float().mean() > 0.4
