"""The packed layout of 2:4-sparse weights, and its exact inverse: 3 bits per weight and the scales.

Of every four neighbouring inputs (a quad) two codes are kept, with their positions i0 < i1 as the nibble i0 + 4 i1. These are
the nonzero ones; where fewer than two are nonzero, the first zeros of the quad fill up. (A kept code may be 8, which is zero.)

As for dense weights, tiles hold 64 outputs x 128 inputs, tiles of the same outputs side by side, N is padded with zero weights:
`codes` int32 [N/64, K/128, 768], `scales` float16 [N/64, groups, 64] in natural order. A tile of 3 KB is two halves of 64
inputs:

    256 words of kept codes  [i / 2][lane 0..31][i % 2][j 0..1]     128 words of positions  [lane 0..31][i 0..3]

A word of kept codes is one lane's A fragment of `mma.sp.m16n8k32`, outputs in the 16 rows, inputs in the 32 columns, fragment i
being 16 of the 64 outputs and j the 32 inputs from 64 jj + 32 j on. With lane = 4 g + t:

    fragment rows g, g + 8 are outputs  8 g + 2 i + h,  h = 0, 1            (as in the dense layout)
    quads t, 4 + t are inputs           64 jj + 32 j + 16 c + 4 t onwards,  c = 0, 1
    nibble 4 e + 2 c + h of the word holds the kept code e = 0, 1 of that output and quad

Positions: sparsity selector j makes the hardware read lanes 2 j and 2 j + 1 of each four, so one word serves both j: bits
16 h + 4 t of the word of lane 4 g + 2 j + c and fragment i are the nibble of that output and quad.

The same words serve `wgmma.sp` with A in registers: its four warps are i = 0..3.
"""

import torch
from torch import Tensor

from marlin_tools.ops.linear.layout import TILE_K, TILE_N, PackedTiles, exponent_of, pack_tiles, with_scales
from marlin_tools.quantized import ZERO, QuantizedLinear, pack_nibbles, unpack_nibbles

WORDS = 768
"""int32 per packed tile."""

_KEPT_WORDS = 256  # of half a tile; the positions follow


def _kept(nonzero: int) -> int:
    """The positions' nibble for a quad, given which of its codes are nonzero as four bits; 15 if more than two are."""
    zeros = [i for i in range(4) if not nonzero >> i & 1]
    chosen = sorted([i for i in range(4) if i not in zeros] + zeros[: max(0, len(zeros) - 2)])
    return chosen[0] | chosen[1] << 2 if len(chosen) == 2 else 15


POSITIONS = tuple(_kept(nonzero) for nonzero in range(16))
"""Nibble of positions by which codes of a quad are nonzero (bit i for position i)."""


class PackedSparse(PackedTiles):
    """Sparse weights, in the layout above."""


def pack_sparse(weight: QuantizedLinear) -> PackedSparse:
    """Arrange kept codes, positions and scales for the kernels, on the device where they are."""
    return PackedSparse(*pack_tiles(weight, WORDS, _words, sparse=True))


def unpack_sparse(packed: PackedSparse) -> QuantizedLinear:
    """The exact inverse of `pack_sparse`."""
    tiles, groups, _ = packed.codes.shape
    halves = packed.codes.contiguous().view(tiles, groups, 2, WORDS // 2)
    # [tile, group, jj, ii, g, t, i2, j, e, c, h] -> [tile, g, ii, i2, h, group, jj, j, c, t, e]
    kept = unpack_nibbles(halves[..., :_KEPT_WORDS]).view(tiles, groups, 2, 2, 8, 4, 2, 2, 2, 2, 2)
    kept = kept.permute(0, 4, 3, 6, 10, 1, 2, 7, 9, 5, 8).reshape(tiles * TILE_N, groups * TILE_K // 4, 2)
    # [tile, group, jj, g, j, c, i, h, t] -> [tile, g, i, h, group, jj, j, c, t]
    where = unpack_nibbles(halves[..., _KEPT_WORDS:]).view(tiles, groups, 2, 8, 2, 2, 4, 2, 4)
    where = where.permute(0, 3, 6, 7, 1, 2, 4, 5, 8).reshape(tiles * TILE_N, groups * TILE_K // 4)
    codes = torch.full((*where.shape, 4), ZERO, dtype=torch.uint8, device=where.device)
    codes.scatter_(2, _indices(where), kept)
    return with_scales(codes.view(tiles * TILE_N, -1), packed)


def random_sparse(n: int, k: int, device: torch.device | str, *, per_column: bool = False) -> PackedSparse:
    """Weights for timing, made where they are used: any bits are kept codes, all positions occur, scales are of usual size."""
    tiles, groups = -(-n // TILE_N), k // TILE_K
    kept = torch.randint(-(2**31), 2**31 - 1, (tiles, groups, 2, _KEPT_WORDS), dtype=torch.int32, device=device)
    legal = torch.tensor(sorted({i | j << 2 for i in range(4) for j in range(i + 1, 4)}), dtype=torch.uint8, device=device)
    places = WORDS // 2 - _KEPT_WORDS
    where = pack_nibbles(legal[torch.randint(0, len(legal), (tiles, groups, 2, 8 * places), device=device)])
    scales = torch.rand((tiles, 1 if per_column else groups, TILE_N), device=device) * 0.004 + 0.004
    return PackedSparse(torch.cat((kept, where), dim=3).view(tiles, groups, WORDS), scales.half(), n, exponent_of(scales))


def _words(codes: Tensor, first: int) -> Tensor:
    """uint8 [rows, K] -> int32 [rows/64, K/128, 768]; `first` is the number of the first row, for the error message."""
    tiles, groups = codes.shape[0] // TILE_N, codes.shape[1] // TILE_K
    quads = codes.reshape(tiles * TILE_N, groups * TILE_K // 4, 4)
    where = _positions(quads, first)
    kept = quads.gather(2, _indices(where))
    # [tile, g, ii, i2, h, group, jj, j, c, t, e] -> [tile, group, jj, ii, g, t, i2, j, e, c, h]
    parts = kept.view(tiles, 8, 2, 2, 2, groups, 2, 2, 2, 4, 2).permute(0, 5, 6, 2, 1, 9, 3, 7, 10, 8, 4)
    # [tile, g, i, h, group, jj, j, c, t] -> [tile, group, jj, g, j, c, i, h, t]
    places = where.view(tiles, 8, 4, 2, groups, 2, 2, 2, 4).permute(0, 4, 5, 1, 6, 7, 2, 3, 8)
    halves = [pack_nibbles(part.reshape(tiles, groups, 2, -1)) for part in (parts, places)]
    return torch.cat(halves, dim=3).view(tiles, groups, WORDS)


def _positions(quads: Tensor, first: int) -> Tensor:
    """The nibble of positions of each quad, uint8 [rows, K/4]."""
    places = torch.tensor((1, 2, 4, 8), dtype=torch.uint8, device=quads.device)
    nonzero = ((quads != ZERO) * places).sum(dim=2, dtype=torch.uint8)
    nibbles = torch.tensor(POSITIONS, dtype=torch.uint8, device=quads.device)[nonzero.int()]
    full = (nibbles == 15).nonzero()
    if len(full):
        n, quad = full[0].tolist()
        raise ValueError(f"output {first + n} has more than two nonzeros in inputs {4 * quad}..{4 * quad + 3}: not 2:4 sparse")
    return nibbles


def _indices(nibbles: Tensor) -> Tensor:
    """Both positions that each nibble names, as gather and scatter want them: int64 [..., 2]."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
