"""The table of kernels: which instantiations exist, what each needs, and for which GPUs.

A `Tile` is how one thread block cuts its work, a `TileShape` one of `kernels/w4a16/{narrow,wide,hopper}.cu`; the sources
explain the parameters. A `Variant` is a tile with an activation type and a kind of scales, that is, one compiled kernel.
`sparse_variants.py` has the same for sparse weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear.layout import TILE_K, TILE_N
from marlin_tools.ops.runtime.compiler import Source

ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Bfloat16"}
"""Activation types and their names in the sources."""

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""Targets that are compiled in tests and whose results are trusted; any other GPU is self-tested first."""

# Shared memory in KiB that one block may use, by compute capability; one KiB more per multiprocessor is the driver's.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_MOST_SLOTS = {"narrow": 4, "wide": 4, "warps": 8, "hopper": 12}


OVERLAP_CAPABILITY = 90
"""From Hopper on, a kernel fetches its first weights while the one before it still runs."""


@dataclass(frozen=True)
class Tile(ABC):
    """The template parameters of one of the kernels, without the number of slots, which depends on the GPU's shared memory.

    kernel      `hopper` runs on Hopper only, the others everywhere
    blocks      n8 blocks of tokens per warp, or per warpgroup (`hopper`)
    along_n     packed tiles of 64 outputs side by side: one per warp, or several per warpgroup (`hopper`)
    along_t     warps side by side along the tokens (`wide`, `warps`)
    residents   blocks that share a multiprocessor where consecutive kernels overlap; elsewhere one has it for itself
    warpgroups  of a block that multiply; one more copies (`hopper`)
    """

    kernel: str
    blocks: int
    along_n: int
    along_t: int = 1
    residents: int = 1
    warpgroups: int = 2

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
    def rounded(self) -> bool:
        """Whether grouped scales are applied to the weights, which rounds these to the type of the activations, not to sums."""
        return False

    @property
    def staged(self) -> bool:
        """Whether blocks of a cluster exchange their sums by copies from shared memory, not from registers (`hopper`)."""
        return self.rounded and self.tokens > 64

    @property
    def along_k(self) -> int:
        """Warps that split the inputs."""
        return 1 if self.kernel == "hopper" else 8 // (self.along_n * self.along_t)

    @property
    def partial_bytes(self) -> int:
        """Float32 sums of one tile."""
        return self.outputs * self.tokens * 4

    @property
    @abstractmethod
    def slot_bytes(self) -> int:
        """Shared memory that one more slot costs a block."""

    def exchange_bytes(self, capability: int) -> int:
        """Shared memory besides the slots: a barrier and the warps' stretches (`hopper`), else where a cluster's sums meet."""
        return 16 + 20 * 4 * self.warpgroups if self.kernel == "hopper" else self._cluster_bytes(capability)

    @abstractmethod
    def _cluster_bytes(self, capability: int) -> int:
        """For the sums of a cluster's other blocks."""

    def runs_on(self, capability: int) -> bool:
        """Whether the instructions exist: wgmma does on Hopper alone."""
        return self.kernel != "hopper" or capability == 90

    def resident(self, capability: int) -> int:
        """Blocks that must fit on a multiprocessor."""
        return self.residents if capability >= OVERLAP_CAPABILITY else 1

    def slots(self, capability: int) -> int:
        """As many as are useful and fit; `resident` blocks must fit."""
        shared = _SHARED_KIB.get(capability, 99) * 1024
        if shared > 99 * 1024:
            shared = (shared + 1024) // self.resident(capability) - 1024
        return min(_MOST_SLOTS[self.kernel], (shared - 256 - self.exchange_bytes(capability)) // self.slot_bytes)

    def shared_bytes(self, capability: int) -> int:
        """Dynamic shared memory of a block."""
        return self.slot_bytes * self.slots(capability) + self.exchange_bytes(capability)

    def expression(self, capability: int) -> str:
        """The C++ type."""
        slots, resident = self.slots(capability), self.resident(capability)
        if self.kernel == "hopper":
            return f"Hopper<{self.tokens}, {self.warpgroups}, {self.along_n // self.warpgroups}, {slots}, {resident}>"
        return self._expression(slots, resident)

    @abstractmethod
    def _expression(self, slots: int, resident: int) -> str:
        """The C++ type of the kernels for any GPU."""


@dataclass(frozen=True)
class TileShape(Tile):
    """A tile of dense weights, for `narrow`, `wide` or `hopper`.

    groups      groups of 128 inputs per slot (`wide`)
    """

    groups: int = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per block."""
        return f"{self.tokens}x{self.outputs}" + ("-tma" if self.kernel == "hopper" else "")

    @property
    def rounded(self) -> bool:
        """From 64 tokens on, where products that must pause for the sums to be scaled would cost more than a rounding."""
        return self.kernel == "hopper" and self.tokens >= 64

    @property
    def slot_bytes(self) -> int:
        """Shared memory that one more slot costs a block."""
        if self.kernel == "narrow":  # eight rings of half groups
            return 8 * (TILE_N * TILE_K // 4 + TILE_N * 2 + self.tokens * (TILE_K + 16))
        padding = 16 * self.tokens if self.kernel == "wide" else 16  # of rows; two barriers
        return self.groups * (self.along_n * (TILE_N * TILE_K // 2 + TILE_N * 2) + self.tokens * TILE_K * 2) + padding

    def _cluster_bytes(self, capability: int) -> int:
        return self.partial_bytes if self.kernel == "narrow" else 0

    def _expression(self, slots: int, resident: int) -> str:
        if self.kernel == "narrow":
            return f"Narrow<{self.blocks}, {self.along_n}, {slots}, {resident}>"
        return f"Wide<{self.blocks}, {self.along_n}, {self.along_t}, {self.along_k}, {self.groups}, {slots}>"


TILES = {
    tile.name: tile
    for tile in (
        TileShape("narrow", 1, 1, residents=2),
        TileShape("narrow", 2, 1, residents=2),
        TileShape("wide", 4, 2, groups=2),
        TileShape("wide", 4, 4),
        TileShape("wide", 4, 2, along_t=2),
        TileShape("wide", 4, 4, along_t=2),
        TileShape("hopper", 1, 2, residents=2),
        TileShape("hopper", 1, 4),
        TileShape("hopper", 2, 2, residents=2),
        TileShape("hopper", 2, 4),
        TileShape("hopper", 4, 2, residents=2),
        TileShape("hopper", 4, 4),
        TileShape("hopper", 8, 2),
        TileShape("hopper", 8, 3, warpgroups=3),
        TileShape("hopper", 8, 4),
        TileShape("hopper", 8, 8),
        TileShape("hopper", 16, 2),
        TileShape("hopper", 16, 3, warpgroups=3),
        TileShape("hopper", 16, 4),
    )
}
"""By name: rows of activations x outputs per block."""


@dataclass(frozen=True)
class Variant:
    """One compiled kernel for dense weights: `kind` is `w4a16` or `dequantize`; `tile` is empty for the latter."""

    kind: str
    dtype: torch.dtype
    tile: str = ""
    grouped: bool = True

    folder: ClassVar[str] = "w4a16"
    tiles: ClassVar[Mapping[str, Tile]] = TILES

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
            return Source(f"{self.folder}/dequantize.cu", f"dequantize_kernel<{element}>")
        tile = self.tiles[self.tile]
        arguments = f"{tile.expression(capability_of(target))}, {element}, {str(self.grouped).lower()}"
        return Source(f"{self.folder}/{tile.kernel}.cu", f"{tile.kernel}_kernel<{arguments}>")

    def dynamic_shared_bytes(self, target: str) -> int:
        """What the launch must ask for."""
        return self.tiles[self.tile].shared_bytes(capability_of(target)) if self.tile else 0

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.tiles[self.tile].threads if self.tile else 256

    @property
    def overlaps(self) -> bool:
        """Whether it may start before the kernel before it has ended."""
        return bool(self.tile)


def capability_of(target: str) -> int:
    """`sm_90a` -> 90."""
    digits = "".join(c for c in target.partition("_")[2] if c.isdigit())
    if not digits:
        raise DeviceError(f"`{target}` is not a GPU target", hint=f"known targets: {', '.join(TARGETS)}")
    return int(digits)


def target_of(device: torch.device) -> str:
    """The target to compile for on a device that is present."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise DeviceError(
            f"`{torch.cuda.get_device_name(device)}` has compute capability {major}.{minor}, the kernels need 8.0 (Ampere)",
            hint="use `--backend reference`",
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def dense_kernels(target: str | None = None) -> list[Variant]:
    """Every dense kernel that exists, or that exists for a target."""
    multiply = [Variant("w4a16", *choice) for choice in instantiations(TILES, target)]
    return multiply + [Variant("dequantize", dtype) for dtype in ELEMENTS]


def instantiations(tiles: Mapping[str, Tile], target: str | None) -> list[tuple[torch.dtype, str, bool]]:
    """Every tile that exists, or that exists for a target, with all types and kinds of scales."""
    names = [name for name, tile in tiles.items() if target is None or tile.runs_on(capability_of(target))]
    return [(dtype, name, grouped) for name in names for dtype in ELEMENTS for grouped in (True, False)]
