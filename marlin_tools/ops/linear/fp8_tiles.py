"""The tiles of `kernels/w4a8/{hopper,ada}.cu` and the kernels of the family: what `tiles.py` has for activations of 16 bits."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from marlin_tools.ops.linear.layout import TILE_K, TILE_N
from marlin_tools.ops.linear.tiles import Tile, choices, product_kernel
from marlin_tools.ops.runtime.kernel import ELEMENTS, Arguments, Kernel
from marlin_tools.quantized import dtype_name

FP8_GROUP_SIZES = (TILE_K,)
"""How many inputs may share a scale, if not all of K do: as many as sums are scaled for at once."""

ROUND = Arguments("RoundArguments", "x:Q rounded:Q scales:Q k:i")
"""Of the kernel that rounds activations, in `kernels/w4a8/round.cu`."""

_ROUND_THREADS, _CHUNK, _HELD = 256, 16, (1, 2, 4)  # inputs that a thread rounds at once; chunks that it keeps


@dataclass(frozen=True)
class Fp8Tile(Tile):
    """A tile for dense weights and activations of 8 bits, for `hopper`."""

    activation_bytes: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per CTA."""
        return f"{self.tokens}x{self.outputs}-fp8"

    @property
    def rounded(self) -> bool:
        """Scales are applied to sums."""
        return False

    @property
    def staged(self) -> bool:
        """Whether CTAs of a cluster exchange their sums by copies from shared memory."""
        return self.tokens <= 128

    @property
    def stage_bytes(self) -> int:
        """Shared memory that one more stage costs a CTA."""
        return self.along_n * (TILE_N * TILE_K // 2 + TILE_N * 2) + self.tokens * TILE_K + 16  # two barriers

    def exchange_bytes(self, capability: int) -> int:
        """Shared memory besides the stages: also room for the outputs of 128 tokens."""
        return super().exchange_bytes(capability) + self.outputs * 128 * 2

    def _cluster_bytes(self, capability: int) -> int:
        return 0

    def expression(self, capability: int) -> str:
        """The C++ type."""
        return self._expression(self.stages(capability), self.ctas_per_sm)

    def _expression(self, stages: int, ctas: int) -> str:
        assert ctas == 1, self
        return f"Fp8<{self.tokens}, {self.consumers}, {stages}>"


@dataclass(frozen=True)
class AdaTile(Tile):
    """The same for `ada`."""

    activation_bytes: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per CTA."""
        return f"{self.tokens}x{self.outputs}-ada"

    @property
    def stage_bytes(self) -> int:
        """Shared memory that one more stage costs a CTA."""
        return self.along_n * (TILE_N * TILE_K // 2 + TILE_N * 2) + self.tokens * TILE_K

    def _cluster_bytes(self, capability: int) -> int:
        return 0

    def _expression(self, stages: int, ctas: int) -> str:
        return f"Ada<{self.n8}, {self.along_n}, {self.along_t}, {stages}>"


FP8_TILES: dict[str, Tile] = {
    tile.name: tile
    for tile in (
        Fp8Tile("hopper", 16, 2),
        Fp8Tile("hopper", 32, 2),
        AdaTile("ada", 4, 4, along_t=2),
        AdaTile("ada", 4, 2, along_t=4),
    )
}
"""By name: rows of activations x outputs per CTA."""


def fp8_kernel(tile: str, dtype: torch.dtype, target: str, group: int) -> Kernel:
    """The kernel of a tile, for outputs of a type and scales per `group` of inputs or, with 0, per output."""
    return _fp8_kernel(FP8_TILES[tile].for_group(group), dtype, target, group)


@cache
def _fp8_kernel(tile: Tile, dtype: torch.dtype, target: str, group: int) -> Kernel:
    return product_kernel("w4a8", tile, dtype, target, group, torch.float8_e4m3fn)


def round_kernel(dtype: torch.dtype, in_features: int, target: str) -> Kernel:
    """What rounds activations with so many inputs."""
    need = -(-in_features // (_ROUND_THREADS * _CHUNK))
    return _round_kernel(dtype, next((held for held in _HELD if held >= need), _HELD[-1]), target)


@cache
def _round_kernel(dtype: torch.dtype, held: int, target: str) -> Kernel:
    return Kernel(
        f"round-{held}-{dtype_name(dtype)}",
        target,
        "w4a8/round.cu",
        f"round_kernel<{ELEMENTS[dtype]}, {held}>",
        _ROUND_THREADS,
        ROUND,
        overlaps=True,
        mirrors=(("kThreads", _ROUND_THREADS), ("kChunk", _CHUNK)),
    )


def round_kernels(dtype: torch.dtype, target: str) -> list[Kernel]:
    """All that round activations of a type."""
    return [_round_kernel(dtype, held, target) for held in _HELD]


def fp8_kernels(target: str) -> list[Kernel]:
    """Every kernel of the family that exists for a target."""
    found = choices(FP8_TILES, target, FP8_GROUP_SIZES)
    if not found:
        return []
    products = dict.fromkeys(fp8_kernel(name, dtype, target, group) for name, dtype, group in found)
    return [*products, *(kernel for dtype in ELEMENTS for kernel in round_kernels(dtype, target))]
