"""The one packed weight layout that all kernels read, and its exact inverse.

Weights are cut into tiles of 64 outputs x 128 inputs, 4 KB each, tiles of the same outputs side by side:
`codes` int32 [N/64, K/128, 1024], `scales` float16 [N/64, K/G, 64] in natural order, where G inputs share a scale: 128, 64, 32,
or all K. N is padded to 64 with code 8 (zero).

Inside a tile, one 32-bit word holds one lane's A fragment of `mma.m16n8k16`: outputs in the 16 rows, inputs in the 16
columns. Word order is [jj 0..1][i 0..3][lane 0..31][j 0..3]: fragment i (16 of the 64 outputs), inputs 64 jj + 16 j onwards,
so a lane reads four k16 steps with one 128-bit access, a warp's accesses are contiguous, and each half of the inputs is one
piece of 2 KB. With lane = 4 g + t:

    fragment rows g, g + 8      are outputs  8 g + 2 i + h,  h = 0, 1   (a lane's eight outputs are neighbours)
    fragment columns 2t, 2t + 1 are inputs   64 jj + 16 j + 8 c + 2 t + e,  c = 0, 1 (columns 8 on), e = 0, 1
    nibble 4 e + 2 c + h of the word holds that code: register 2 c + h of the fragment, element e

The same words serve `wgmma` with A in registers: its four warps are i = 0..3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from marlin_tools.quantized import ZERO, QuantizedLinear, unpack_nibbles

TILE_N = 64
"""Outputs per packed tile."""

TILE_K = 128
"""Inputs per packed tile."""

GROUP_SIZES, SPARSE_GROUP_SIZES = (128, 64, 32), (128,)
"""How many inputs may share a scale, if not all of K do; and of sparse weights."""

WORDS = TILE_N * TILE_K // 8
"""int32 per packed tile."""

LEAST_EXPONENT, MOST_EXPONENT = -12, 24
"""Of `exponent_of`: for scales of next to nothing, and for the largest float16."""

MOST_ROUNDED = 12
"""The largest exponent with which kernels round float16 weights: small ones are then wrong by up to 2^-13. A weight with scales
of 16 or more, an outlier beyond 100, goes to cuBLAS instead.
"""

_EXPONENTS = (LEAST_EXPONENT, -2, 8, MOST_ROUNDED)

_ROWS_AT_ONCE = 1024  # bounds the scratch memory of packing to some bytes per weight of so many outputs


@dataclass(frozen=True)
class PackedTiles:
    """What kernels read, dense or sparse. `out_features` is the true N; the tensors are padded to a multiple of 64. The
    exponent is `exponent_of` the scales.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    exponent: int

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1] * TILE_K

    @property
    def group_size(self) -> int:
        """How many inputs share a scale: K with one per output."""
        return self.in_features // self.scales.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """The same weights on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


class PackedWeight(PackedTiles):
    """Dense weights, in the layout above."""


def exponent_of(scales: Tensor) -> int:
    """The power of two by which kernels that round float16 weights make them smaller, and their sums as much greater.

    These kernels multiply with a scale times 2^(24 - exponent), which must fit float16 (`Half::Scales` in
    kernels/common/element.cuh), and weights are no more precise than 2^(exponent - 25). One of few values, so that what
    `torch.compile` makes of a layer serves others too: 8 for scales from a thousandth to 1, those of every usual model.
    """
    largest = float(torch.where(scales.isfinite(), scales.abs(), 0).max())
    least = math.frexp(largest)[1] + 8
    return next((exponent for exponent in _EXPONENTS if least <= exponent), least)


def limits(in_features: int, group_size: int, *, sparse: bool = False) -> str | None:
    """Why the kernels, dense or sparse, cannot hold such a weight, or None."""
    if in_features % TILE_K:
        return f"{in_features} inputs are not a multiple of {TILE_K}"
    known = SPARSE_GROUP_SIZES if sparse else GROUP_SIZES
    if group_size not in {*known, in_features}:
        sizes = ", ".join(map(str, known))
        return f"group_size {group_size} is neither {sizes} nor all of the {in_features} inputs"
    return None


def pack(weight: QuantizedLinear) -> PackedWeight:
    """Arrange codes and scales for the kernels, on the device where they are."""
    return PackedWeight(*pack_tiles(weight, WORDS, lambda rows, _: _words(rows)))


def pack_tiles(
    weight: QuantizedLinear, words: int, words_of: Callable[[Tensor, int], Tensor], *, sparse: bool = False
) -> tuple[Tensor, Tensor, int, int]:
    """Codes, scales, N and exponent of a packed weight. `words_of` packs some rows, a multiple of 64, given the number of the
    first.
    """
    n, k = weight.shape
    reason = limits(k, weight.group_size, sparse=sparse)
    if reason:
        raise ValueError(reason)
    tiles = -(-n // TILE_N)
    packed = torch.empty((tiles, k // TILE_K, words), dtype=torch.int32, device=weight.codes.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = weight.codes[start : start + _ROWS_AT_ONCE]
        missing = -rows.shape[0] % TILE_N
        if missing:
            rows = torch.cat([rows, rows.new_full((missing, k), ZERO)])
        packed[start // TILE_N : start // TILE_N + rows.shape[0] // TILE_N] = words_of(rows, start)
    scales = torch.zeros((tiles * TILE_N, weight.scales.shape[1]), dtype=torch.float16, device=weight.scales.device)
    scales[:n] = weight.scales
    return packed, scales.view(tiles, TILE_N, -1).transpose(1, 2).contiguous(), n, exponent_of(scales)


def unpack(packed: PackedWeight) -> QuantizedLinear:
    """The exact inverse of `pack`."""
    tiles, groups, _ = packed.codes.shape
    # [tile, group, jj, i, g, t, j, e, c, h] -> [tile, g, i, h, group, jj, j, c, t, e]
    parts = unpack_nibbles(packed.codes).view(tiles, groups, 2, 4, 8, 4, 4, 2, 2, 2)
    codes = parts.permute(0, 4, 3, 9, 1, 2, 6, 8, 5, 7).reshape(tiles * TILE_N, groups * TILE_K)
    return with_scales(codes, packed)


def with_scales(codes: Tensor, packed: PackedTiles) -> QuantizedLinear:
    """The weight of which these are the unpacked codes, uint8 [64 tiles, K]."""
    scales = packed.scales.transpose(1, 2).flatten(0, 1)
    n = packed.out_features
    return QuantizedLinear(codes[:n].contiguous(), scales[:n].contiguous(), packed.group_size)


def _words(codes: Tensor) -> Tensor:
    """uint8 [rows, K] -> int32 [rows/64, K/128, 1024]."""
    tiles, groups = codes.shape[0] // TILE_N, codes.shape[1] // TILE_K
    # [tile, g, i, h, group, jj, j, c, t, e] -> [tile, group, jj, i, g, t, j, e, c, h]
    parts = codes.view(tiles, 8, 4, 2, groups, 2, 4, 2, 4, 2).permute(0, 4, 5, 2, 1, 8, 6, 9, 7, 3).contiguous()
    as_bytes = parts[..., 0] | parts[..., 1] << 4
    return as_bytes.reshape(tiles, groups, -1).view(torch.int32)
