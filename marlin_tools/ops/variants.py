"""The table of kernels: which instantiations exist, what each needs, and for which GPUs.

A `TileShape` is how one thread block of `kernels/w4a16/{narrow,wide,hopper}.cu` cuts its work; the sources explain the
parameters. A `Variant` is a tile with an activation type and a kind of scales, that is, one compiled kernel.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops.compiler import Source
from marlin_tools.ops.layout import TILE_K, TILE_N

ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Bfloat16"}
"""Activation types and their names in the sources."""

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""Targets that are compiled in tests and whose results are trusted; any other GPU is self-tested first."""

# Shared memory in KiB that one block may use, by compute capability; one KiB more per multiprocessor is the driver's.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_MOST_SLOTS = {"narrow": 4, "wide": 4, "hopper": 12}


def shared_kib(capability: int) -> int:
    """Shared memory in KiB that one block may use; the least of all for GPUs to come."""
    return _SHARED_KIB.get(capability, 99)


OVERLAP_CAPABILITY = 90
"""From Hopper on, a kernel fetches its first weights while the one before it still runs."""


@dataclass(frozen=True)
class TileShape:
    """The template parameters of one of the kernels, without the number of slots, which depends on the GPU's shared memory.

    kernel      `narrow` and `wide` run everywhere, `hopper` on Hopper only
    blocks      n8 blocks of tokens per warp
    along_n     packed tiles of 64 outputs side by side: one per warp, or several per warpgroup (`hopper`)
    along_t     warps side by side along the tokens (`wide`)
    groups      groups of 128 inputs per slot (`wide`)
    residents   blocks that share a multiprocessor (`hopper`)
    warpgroups  of a block that multiply; one more copies (`hopper`)
    """

    kernel: Literal["narrow", "wide", "hopper"]
    blocks: int
    along_n: int
    along_t: int = 1
    groups: int = 1
    residents: int = 1
    warpgroups: int = 2

    @property
    def name(self) -> str:
        """Rows of activations x outputs per block."""
        return f"{self.tokens}x{self.outputs}" + ("-tma" if self.kernel == "hopper" else "")

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
        """Warps that split the inputs."""
        return 1 if self.kernel == "hopper" else 8 // (self.along_n * self.along_t)

    @property
    def partial_bytes(self) -> int:
        """Float32 sums of one tile."""
        return self.outputs * self.tokens * 4

    @property
    def slot_bytes(self) -> int:
        """Shared memory that one more slot costs a block."""
        if self.kernel == "narrow":  # eight rings of half groups
            return 8 * (TILE_N * TILE_K // 4 + TILE_N * 2 + self.tokens * (TILE_K + 16))
        padding = {"wide": 16 * self.tokens, "hopper": 16}.get(self.kernel, 0)  # of rows; two barriers
        return self.groups * (self.along_n * (TILE_N * TILE_K // 2 + TILE_N * 2) + self.tokens * TILE_K * 2) + padding

    @property
    def exchange_bytes(self) -> int:
        """Shared memory besides the slots: where sums of a cluster's second block arrive; a barrier and each warp's stretch."""
        return {"narrow": self.partial_bytes, "hopper": 16 + 20 * 4 * self.warpgroups}.get(self.kernel, 0)

    def runs_on(self, capability: int) -> bool:
        """Whether the instructions exist: wgmma does on Hopper alone."""
        return self.kernel != "hopper" or capability == 90

    def resident(self, capability: int) -> int:
        """Blocks that must fit on a multiprocessor: two narrow ones where consecutive kernels overlap."""
        return 2 if self.kernel == "narrow" and capability >= OVERLAP_CAPABILITY else self.residents

    def slots(self, capability: int) -> int:
        """As many as are useful and fit; `resident` blocks must fit."""
        shared = shared_kib(capability) * 1024
        if shared > 99 * 1024:
            shared = (shared + 1024) // self.resident(capability) - 1024
        return min(_MOST_SLOTS[self.kernel], (shared - 256 - self.exchange_bytes) // self.slot_bytes)

    def shared_bytes(self, capability: int) -> int:
        """Dynamic shared memory of a block."""
        return self.slot_bytes * self.slots(capability) + self.exchange_bytes

    def expression(self, capability: int) -> str:
        """The C++ type."""
        slots, resident = self.slots(capability), self.resident(capability)
        if self.kernel == "narrow":
            return f"Narrow<{self.blocks}, {self.along_n}, {slots}, {resident}>"
        if self.kernel == "wide":
            return f"Wide<{self.blocks}, {self.along_n}, {self.along_t}, {self.along_k}, {self.groups}, {slots}>"
        return f"Hopper<{self.tokens}, {self.warpgroups}, {self.along_n // self.warpgroups}, {slots}, {resident}>"


TILES = {
    tile.name: tile
    for tile in (
        TileShape("narrow", 1, 1),
        TileShape("narrow", 2, 1),
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
        TileShape("hopper", 16, 2),
        TileShape("hopper", 16, 4),
    )
}
"""By name: rows of activations x outputs per block."""


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: `kind` is `w4a16` or `dequantize`; `tile` is empty for the latter."""

    kind: Literal["w4a16", "dequantize"]
    dtype: torch.dtype
    tile: str = ""
    grouped: bool = True

    @property
    def name(self) -> str:
        """As shown to users and used as the key of the register table."""
        parts = [self.kind, self.tile, str(self.dtype).removeprefix("torch.")]
        if self.kind == "w4a16":
            parts.append("g128" if self.grouped else "column")
        return "-".join(part for part in parts if part)

    def source(self, target: str) -> Source:
        """The instantiation to compile for a target."""
        element = ELEMENTS[self.dtype]
        if self.kind == "dequantize":
            return Source("w4a16/dequantize.cu", f"dequantize_kernel<{element}>")
        tile = TILES[self.tile]
        arguments = f"{tile.expression(capability_of(target))}, {element}, {str(self.grouped).lower()}"
        return Source(f"w4a16/{tile.kernel}.cu", f"{tile.kernel}_kernel<{arguments}>")

    def dynamic_shared_bytes(self, target: str) -> int:
        """What the launch must ask for."""
        if self.kind == "dequantize":
            return 0
        return TILES[self.tile].shared_bytes(capability_of(target))

    @property
    def threads(self) -> int:
        """Threads per block."""
        return TILES[self.tile].threads if self.tile else 256

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
    tiles = [name for name, tile in TILES.items() if target is None or tile.runs_on(capability_of(target))]
    multiply = [Variant("w4a16", dtype, tile, grouped) for tile in tiles for dtype in ELEMENTS for grouped in (True, False)]
    return multiply + [Variant("dequantize", dtype) for dtype in ELEMENTS]
