"""The table of sparse kernels: which instantiations of `kernels/w24a16/` exist, what each needs, and for which GPUs.

As `variants.py` does for the dense ones: a `SparseTile` is how one thread block cuts its work, a `SparseVariant` is a tile with
an activation type and a kind of scales, that is, one compiled kernel.
"""

from dataclasses import dataclass

from marlin_tools.ops.linear.layout import TILE_K, TILE_N
from marlin_tools.ops.linear.sparse_layout import WORDS
from marlin_tools.ops.linear.variants import ELEMENTS, OVERLAP_CAPABILITY, Tile, Variant, instantiations

_TILE_BYTES = 4 * WORDS
_SCALE_BYTES = 2 * TILE_N


@dataclass(frozen=True)
class SparseTile(Tile):
    """A tile of sparse weights, for `warps` or `hopper`. A slot of `warps` has a group of 128 inputs for each warp along them.

    splits      blocks of the largest cluster that may split the inputs of a tile (`warps`)
    """

    splits: int = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per block; of the Hopper kernel also how many share a multiprocessor, if several do."""
        more = "" if self.residents == 1 else f"x{self.residents}"
        more += "" if self.warpgroups == 2 else f"w{self.warpgroups}"
        return f"{self.tokens}x{self.outputs}" + (f"-tma{more}" if self.kernel == "hopper" else "")

    @property
    def rounded(self) -> bool:
        """From 64 tokens on, where products that must pause for the sums to be scaled would cost more than a rounding."""
        return self.kernel == "hopper" and self.tokens >= 64

    @property
    def staged(self) -> bool:
        """Sums of a cluster are sent from registers: half a kilobyte at a time, without a copy of their own."""
        return False

    @property
    def slot_bytes(self) -> int:
        """Shared memory that one more slot costs a block."""
        weights = self.along_n * self.along_k * (_TILE_BYTES + _SCALE_BYTES)
        if self.kernel == "hopper":
            return weights + self.tokens * TILE_K * 2 + 16  # two barriers
        return -(-(weights + self.tokens * (self.along_k * TILE_K * 2 + 16)) // 128) * 128

    def _cluster_bytes(self, capability: int) -> int:
        return (self.splits - 1) * self.partial_bytes if capability >= OVERLAP_CAPABILITY else 0

    def _expression(self, slots: int, resident: int) -> str:
        return f"Warps<{self.blocks}, {self.along_n}, {self.along_t}, {self.along_k}, {slots}, {resident}>"


SPARSE_TILES = {
    tile.name: tile
    for tile in (
        SparseTile("warps", 1, 1, residents=2, splits=2),
        SparseTile("warps", 1, 4),
        SparseTile("warps", 2, 2, splits=4),
        SparseTile("warps", 4, 4),
        SparseTile("warps", 4, 4, along_t=2),
        SparseTile("hopper", 1, 2, residents=2),
        SparseTile("hopper", 1, 3, residents=2, warpgroups=3),
        SparseTile("hopper", 2, 2, residents=2),
        SparseTile("hopper", 2, 3, residents=2, warpgroups=3),
        SparseTile("hopper", 4, 2, residents=2),
        SparseTile("hopper", 4, 3, residents=2, warpgroups=3),
        SparseTile("hopper", 4, 8),
        SparseTile("hopper", 8, 2),
        SparseTile("hopper", 8, 3, warpgroups=3),
        SparseTile("hopper", 8, 3, residents=2, warpgroups=3),
        SparseTile("hopper", 8, 4),
        SparseTile("hopper", 8, 6, warpgroups=3),
        SparseTile("hopper", 16, 2),
        SparseTile("hopper", 16, 3, warpgroups=3),
        SparseTile("hopper", 16, 4),
        SparseTile("hopper", 32, 2),
    )
}
"""By name: rows of activations x outputs per block."""


class SparseVariant(Variant):
    """One compiled kernel for sparse weights: `kind` is `w24a16` or `dequantize-24`; `tile` is empty for the latter."""

    folder = "w24a16"
    tiles = SPARSE_TILES


def sparse_kernels(target: str | None = None) -> list[SparseVariant]:
    """Every sparse kernel that exists, or that exists for a target."""
    multiply = [SparseVariant("w24a16", *choice) for choice in instantiations(SPARSE_TILES, target)]
    return multiply + [SparseVariant("dequantize-24", dtype) for dtype in ELEMENTS]
