"""The table of tiles for 2:4-sparse weights and the kernels that they are compiled to: what `tiles.py` is for dense ones."""

from dataclasses import dataclass
from functools import cache

import torch

from marlin_tools.ops.linear.layout import SPARSE_GROUP_SIZES, TILE_K, TILE_N
from marlin_tools.ops.linear.sparse_layout import WORDS
from marlin_tools.ops.linear.tiles import StripTile, Tile, choices, dequantizing_kernel, product_kernel
from marlin_tools.ops.runtime.kernel import ELEMENTS, Kernel
from marlin_tools.ops.runtime.target import OVERLAP_CAPABILITY

_TILE_BYTES = 4 * WORDS
_SCALE_BYTES = 2 * TILE_N


@dataclass(frozen=True)
class SparseTile(Tile):
    """A tile of sparse weights, for `warps` or `hopper`. A stage of `warps` has a packed tile for each warp along the inputs.

    splits  CTAs of the largest cluster that may split the inputs of a tile (`warps`)
    """

    splits: int = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per CTA; of the Hopper kernel also how many share an SM, if several do."""
        more = "" if self.ctas_per_sm == 1 else f"x{self.ctas_per_sm}"
        more += "" if self.consumers == 2 else f"w{self.consumers}"
        return f"{self.tokens}x{self.outputs}" + (f"-tma{more}" if self.kernel == "hopper" else "")

    @property
    def staged(self) -> bool:
        """Sums of a cluster are sent from registers: half a kilobyte at a time, without a copy of their own."""
        return False

    @property
    def stage_bytes(self) -> int:
        """Shared memory that one more stage costs a CTA."""
        weights = self.along_n * self.along_k * (_TILE_BYTES + _SCALE_BYTES)
        if self.kernel == "hopper":
            return weights + self.tokens * TILE_K * 2 + 16  # two barriers
        return -(-(weights + self.tokens * (self.along_k * TILE_K * 2 + 16)) // 128) * 128

    def _cluster_bytes(self, capability: int) -> int:
        return (self.splits - 1) * self.partial_bytes if capability >= OVERLAP_CAPABILITY else 0

    def _expression(self, stages: int, ctas: int) -> str:
        return f"Warps<{self.n8}, {self.along_n}, {self.along_t}, {self.along_k}, {stages}, {ctas}>"


SPARSE_TILES: dict[str, Tile] = {
    tile.name: tile
    for tile in (
        StripTile("strip", 1, 1),
        SparseTile("warps", 1, 1, ctas_per_sm=2, splits=2),
        SparseTile("warps", 1, 4),
        SparseTile("warps", 2, 2, splits=4),
        SparseTile("warps", 4, 4),
        SparseTile("warps", 4, 4, along_t=2),
        SparseTile("hopper", 1, 2, ctas_per_sm=2),
        SparseTile("hopper", 1, 3, ctas_per_sm=2, consumers=3),
        SparseTile("hopper", 2, 2, ctas_per_sm=2),
        SparseTile("hopper", 2, 3, ctas_per_sm=2, consumers=3),
        SparseTile("hopper", 4, 2, ctas_per_sm=2),
        SparseTile("hopper", 4, 3, ctas_per_sm=2, consumers=3),
        SparseTile("hopper", 4, 8),
        SparseTile("hopper", 8, 2),
        SparseTile("hopper", 8, 3, consumers=3),
        SparseTile("hopper", 8, 3, ctas_per_sm=2, consumers=3),
        SparseTile("hopper", 8, 4),
        SparseTile("hopper", 8, 6, consumers=3),
        SparseTile("hopper", 16, 2),
        SparseTile("hopper", 16, 3, consumers=3),
        SparseTile("hopper", 16, 4),
        SparseTile("hopper", 32, 2),
    )
}
"""By name: rows of activations x outputs per CTA."""


@cache
def sparse_kernel(tile: str, dtype: torch.dtype, target: str, group: int) -> Kernel:
    """The kernel of a sparse tile, for scales per `group` of inputs or, with 0, per output."""
    return product_kernel("w24a16", SPARSE_TILES[tile], dtype, target, group)


def sparse_kernels(target: str) -> list[Kernel]:
    """Every sparse kernel that exists for a target."""
    found = choices(SPARSE_TILES, target, SPARSE_GROUP_SIZES)
    products = [sparse_kernel(name, dtype, target, group) for name, dtype, group in found]
    return products + [dequantizing_kernel("w24a16", dtype, target) for dtype in ELEMENTS]
