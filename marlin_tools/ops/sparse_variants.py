"""The table of sparse kernels: which instantiations of `kernels/w24a16/` exist, what each needs, and for which GPUs.

As `variants.py` does for the dense ones: a `SparseTile` is how one thread block cuts its work, a `SparseVariant` is a tile with
an activation type and a kind of scales, that is, one compiled kernel.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from marlin_tools.ops.compiler import Source
from marlin_tools.ops.layout import TILE_K, TILE_N
from marlin_tools.ops.sparse_layout import WORDS
from marlin_tools.ops.variants import ELEMENTS, OVERLAP_CAPABILITY, capability_of, shared_kib

_TILE_BYTES = 4 * WORDS
_SCALE_BYTES = 2 * TILE_N
_MOST_SLOTS = {"warps": 8, "hopper": 12}


@dataclass(frozen=True)
class SparseTile:
    """The template parameters of one of the kernels, without the number of slots, which depends on the GPU's shared memory.

    kernel     `warps` runs everywhere, `hopper` on Hopper only
    blocks     n8 blocks of tokens per warp or warpgroup
    along_n    packed tiles of 64 outputs side by side: one per warp, or several per warpgroup (`hopper`)
    along_t    warps side by side along the tokens (`warps`)
    residents  blocks that must fit on a multiprocessor where consecutive kernels overlap, else one
    splits     blocks of the largest cluster that may split the inputs of a tile (`warps`)
    warpgroups that multiply, one more copies (`hopper`)
    """

    kernel: Literal["warps", "hopper"]
    blocks: int
    along_n: int
    along_t: int = 1
    residents: int = 1
    splits: int = 1
    warpgroups: int = 2

    @property
    def name(self) -> str:
        """Rows of activations x outputs per block; of the Hopper kernel also how many share a multiprocessor, if several do."""
        more = "" if self.residents == 1 else f"x{self.residents}"
        more += "" if self.warpgroups == 2 else f"w{self.warpgroups}"
        return f"{self.tokens}x{self.outputs}" + (f"-tma{more}" if self.kernel == "hopper" else "")

    @property
    def tokens(self) -> int:
        """Rows of the activations per block."""
        return 8 * self.blocks * self.along_t

    @property
    def outputs(self) -> int:
        """Outputs per block."""
        return TILE_N * self.along_n

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 128 * (self.warpgroups + 1) if self.kernel == "hopper" else 256

    @property
    def along_k(self) -> int:
        """Warps that split the inputs, and groups of 128 inputs per slot."""
        return 1 if self.kernel == "hopper" else 8 // (self.along_n * self.along_t)

    @property
    def partial_bytes(self) -> int:
        """Float32 sums of one tile."""
        return self.outputs * self.tokens * 4

    @property
    def slot_bytes(self) -> int:
        """Shared memory that one more slot costs a block."""
        weights = self.along_n * self.along_k * (_TILE_BYTES + _SCALE_BYTES)
        if self.kernel == "hopper":
            return weights + self.tokens * TILE_K * 2 + 16  # two barriers
        return -(-(weights + self.tokens * (self.along_k * TILE_K * 2 + 16)) // 128) * 128

    @property
    def pair(self) -> int:
        """Blocks that fetch activations for each other: none do."""
        return 1

    def exchange_bytes(self, capability: int) -> int:
        """Shared memory behind the ring: for sums of a cluster's other blocks, or (`hopper`) what barriers and warps need."""
        if self.kernel == "hopper":
            return 16 + 20 * 4 * self.warpgroups
        return (self.splits - 1) * self.partial_bytes if capability >= OVERLAP_CAPABILITY else 0

    def runs_on(self, capability: int) -> bool:
        """Whether the instructions exist: wgmma does on Hopper alone."""
        return self.kernel != "hopper" or capability == 90

    def resident(self, capability: int) -> int:
        """Blocks that must fit on a multiprocessor."""
        return self.residents if capability >= OVERLAP_CAPABILITY else 1

    def slots(self, capability: int) -> int:
        """As many as are useful and fit."""
        shared = shared_kib(capability) * 1024
        if shared > 99 * 1024:
            shared = (shared + 1024) // self.resident(capability) - 1024
        return min(_MOST_SLOTS[self.kernel], (shared - 256 - self.exchange_bytes(capability)) // self.slot_bytes)

    def shared_bytes(self, capability: int) -> int:
        """Dynamic shared memory of a block."""
        return self.slot_bytes * self.slots(capability) + self.exchange_bytes(capability)

    def expression(self, capability: int) -> str:
        """The C++ type."""
        rest = f"{self.slots(capability)}, {self.resident(capability)}>"
        if self.kernel == "warps":
            return f"Warps<{self.blocks}, {self.along_n}, {self.along_t}, {self.along_k}, {rest}"
        return f"Hopper<{self.tokens}, {self.warpgroups}, {self.along_n // self.warpgroups}, {rest}"


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
        SparseTile("hopper", 8, 4),
        SparseTile("hopper", 8, 8),
        SparseTile("hopper", 16, 2),
        SparseTile("hopper", 16, 3, warpgroups=3),
        SparseTile("hopper", 16, 4),
    )
}
"""By name: rows of activations x outputs per block."""


@dataclass(frozen=True)
class SparseVariant:
    """One compiled kernel: `kind` is `w24a16` or `dequantize-24`; `tile` is empty for the latter."""

    kind: Literal["w24a16", "dequantize-24"]
    dtype: torch.dtype
    tile: str = ""
    grouped: bool = True

    @property
    def name(self) -> str:
        """As shown to users and used as the key of the register table."""
        parts = [self.kind, self.tile, str(self.dtype).removeprefix("torch.")]
        if self.tile:
            parts.append("g128" if self.grouped else "column")
        return "-".join(part for part in parts if part)

    def source(self, target: str) -> Source:
        """The instantiation to compile for a target."""
        element = ELEMENTS[self.dtype]
        if not self.tile:
            return Source("w24a16/dequantize.cu", f"dequantize_kernel<{element}>")
        tile = SPARSE_TILES[self.tile]
        arguments = f"{tile.expression(capability_of(target))}, {element}, {str(self.grouped).lower()}"
        return Source(f"w24a16/{tile.kernel}.cu", f"{tile.kernel}_kernel<{arguments}>")

    def dynamic_shared_bytes(self, target: str) -> int:
        """What the launch must ask for."""
        return SPARSE_TILES[self.tile].shared_bytes(capability_of(target)) if self.tile else 0

    @property
    def threads(self) -> int:
        """Threads per block."""
        return SPARSE_TILES[self.tile].threads if self.tile else 256

    @property
    def overlaps(self) -> bool:
        """Whether it may start before the kernel before it has ended."""
        return bool(self.tile)


def sparse_kernels(target: str | None = None) -> list[SparseVariant]:
    """Every sparse kernel that exists, or that exists for a target."""
    tiles = [name for name, tile in SPARSE_TILES.items() if target is None or tile.runs_on(capability_of(target))]
    pairs = [(dtype, grouped) for dtype in ELEMENTS for grouped in (True, False)]
    multiply = [SparseVariant("w24a16", dtype, tile, grouped) for tile in tiles for dtype, grouped in pairs]
    return multiply + [SparseVariant("dequantize-24", dtype) for dtype in ELEMENTS]
