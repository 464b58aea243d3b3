"""The table of tiles, how a CTA may cut its work, and the kernels that they are compiled to, for which GPUs.

A `Tile` holds the template parameters of one of `kernels/w4a16/{strip,narrow,wide,hopper}.cu`; the sources explain them. A tile
with a type of activations and a kind of scales is one kernel. `sparse_tiles.py` has the same for sparse weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch

from marlin_tools.ops.linear.layout import GROUP_SIZES, TILE_K, TILE_N, WORDS
from marlin_tools.ops.runtime.kernel import ELEMENTS, MAP_BYTES, Arguments, Kernel
from marlin_tools.ops.runtime.target import OVERLAP_CAPABILITY, capability_of
from marlin_tools.quantized import LEVELS, ZERO, dtype_name

PROBLEM = Arguments(
    "Problem",
    "x:Q codes:Q scales:Q bias:Q y:Q partials:Q arrivals:Q m:i n:i tiles_n:i tiles_k:i token_tiles:i split:i "
    "schedule.run:I schedule.longer:I token_scales:Q",
)
"""Of the kernels for any GPU, in `kernels/linear/problem.cuh`."""

HOPPER_PROBLEM = Arguments(
    "HopperProblem",
    "codes:Q scales:Q bias:Q y:Q partials:Q arrivals:Q m:i n:i tiles_n:i tiles_k:i token_tiles:i split:i tiles:i "
    "shared_tiles:i schedule.run:I schedule.longer:I offset_per_scale:I growth:f token_scales:Q",
    mapped=True,
)
"""Of the Hopper kernels, in `kernels/linear/hopper_work.cuh`."""

WEIGHTS = Arguments("Weights", "codes:Q scales:Q out:Q tiles_k:i scale_groups:i rows:i")
"""Of the kernels that dequantise, in `kernels/linear/dequantize.cuh`."""

# Shared memory in KiB that one CTA may use, by compute capability; one KiB more per SM is the driver's.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_THREADS = 256  # of a CTA, but for Hopper's
_MOST_STAGES = {"narrow": 4, "wide": 4, "ada": 4, "warps": 8, "hopper": 12}


@dataclass(frozen=True)
class Tile(ABC):
    """The template parameters of one of the kernels, without the number of stages, which depends on the GPU's shared memory.

    kernel       `hopper` runs on Hopper only, `ada` also on Ada, the others everywhere
    n8           n8 tiles of tokens per warp, or per warpgroup (`hopper`)
    along_n      packed tiles of 64 outputs side by side: one per warp, or several per warpgroup (`hopper`)
    along_t      warps side by side along the tokens (`wide`, `warps`, `ada`)
    ctas_per_sm  CTAs that share an SM where consecutive kernels overlap; elsewhere one has it for itself
    consumers    warpgroups of a CTA that multiply; one more is the producer (`hopper`)
    scale_rows   rows of scales of a packed tile: what `for_group` makes of the tiles in the tables
    """

    kernel: str
    n8: int
    along_n: int
    along_t: int = 1
    ctas_per_sm: int = 1
    consumers: int = 2
    scale_rows: int = 1

    activation_bytes: ClassVar[int] = 2
    """Of an activation that tensor cores multiply."""

    def for_group(self, group: int) -> Self:
        """The same tile for scales per `group` of inputs or, with 0, per output."""
        return replace(self, scale_rows=max(1, TILE_K // group) if group else 1)

    @property
    def tokens(self) -> int:
        """Rows of the activations per CTA."""
        return 8 * self.n8 * self.along_t

    @property
    def outputs(self) -> int:
        """Outputs per CTA."""
        return TILE_N * self.along_n

    @property
    def threads(self) -> int:
        """Threads per CTA."""
        return 128 * (self.consumers + 1) if self.kernel == "hopper" else _THREADS

    @property
    def rounded(self) -> bool:
        """Whether grouped scales are applied to the weights, which rounds these to the type of the operands, not to sums.

        From 64 tokens on, or 32 with narrow groups, where products that must pause for the sums to be scaled would cost more
        than a rounding.
        """
        return self.kernel == "hopper" and self.tokens >= (32 if self.scale_rows > 1 else 64)

    @property
    def staged(self) -> bool:
        """Whether CTAs of a cluster exchange their sums by copies from shared memory, not from registers (`hopper`)."""
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
    def counters(self) -> int:
        """Arrival counters of a CTA with stream-K: one for each warp that holds sums at the end of a tile."""
        return 4 * self.consumers if self.kernel == "hopper" else self.along_n * self.along_t

    @property
    @abstractmethod
    def name(self) -> str:
        """By which tables and people know it."""

    @property
    @abstractmethod
    def stage_bytes(self) -> int:
        """Shared memory that one more stage costs a CTA."""

    def exchange_bytes(self, capability: int) -> int:
        """Shared memory besides the stages: a barrier and the warps' work ranges (`hopper`), else room for a cluster's sums."""
        return 16 + 20 * 4 * self.consumers if self.kernel == "hopper" else self._cluster_bytes(capability)

    @abstractmethod
    def _cluster_bytes(self, capability: int) -> int:
        """For the sums of a cluster's other CTAs."""

    def fits(self, m: int, k: int, capability: int) -> bool:
        """Whether so many rows of so many inputs can be multiplied."""
        return True

    def runs_on(self, capability: int) -> bool:
        """Whether the instructions exist and are known to do what they should: wgmma is Hopper's alone, e4m3 came with Ada."""
        return capability in {"hopper": (90,), "ada": (89, 90)}.get(self.kernel, (capability,))

    def ctas_on_sm(self, capability: int) -> int:
        """CTAs that must fit on an SM. The registers of two for 16 tokens with narrow groups would not."""
        alone = capability < OVERLAP_CAPABILITY or (self.kernel == "narrow" and self.n8 > 1 and self.scale_rows > 1)
        return 1 if alone else self.ctas_per_sm

    def stages(self, capability: int) -> int:
        """As many as are useful and fit; `ctas_on_sm` CTAs must fit."""
        shared = _SHARED_KIB.get(capability, 99) * 1024
        if shared > 99 * 1024:
            shared = (shared + 1024) // self.ctas_on_sm(capability) - 1024
        return min(_MOST_STAGES[self.kernel], (shared - 256 - self.exchange_bytes(capability)) // self.stage_bytes)

    def shared_bytes(self, capability: int) -> int:
        """Dynamic shared memory of a CTA."""
        return self.stage_bytes * self.stages(capability) + self.exchange_bytes(capability)

    def expression(self, capability: int) -> str:
        """The C++ type."""
        stages, ctas = self.stages(capability), self.ctas_on_sm(capability)
        if self.kernel == "hopper":
            along_n = self.along_n // self.consumers
            return f"Hopper<{self.tokens}, {self.consumers}, {along_n}, {stages}, {ctas}, {self.scale_rows}>"
        return self._expression(stages, ctas)

    @abstractmethod
    def _expression(self, stages: int, ctas: int) -> str:
        """The C++ type of the kernels for any GPU."""

    def mirrors(self, capability: int) -> tuple[tuple[str, int], ...]:
        """Constants of the C++ type that Python computes as well."""
        c, staged = self.expression(capability), self.stages(capability) * self.stage_bytes
        if self.kernel != "hopper":
            pipelines = "kWarps" if self.kernel == "narrow" else "1"
            return (
                (f"{c}::kTokens", self.tokens),
                (f"{c}::kWarpsN * kTileRows", self.outputs),
                (f"{c}::kWarpsK", self.along_k),
                (f"{pipelines} * {c}::kStages * {c}::kStageBytes", staged),
                (f"{c}::kWarpsN * {c}::kTokens * kTileRows * 4", self.partial_bytes),
            )
        return (
            ("sizeof(TensorMap)", MAP_BYTES),
            (f"{c}::kTokens", self.tokens),
            (f"{c}::kCtaTiles * kTileRows", self.outputs),
            (f"{c}::kThreads", self.threads),
            (f"{c}::kSharedBytes", self.shared_bytes(capability)),
            (f"{c}::kConsumerWarps", self.counters),
            (f"{c}::kConsumerWarps * {c}::kTiles * {c}::kFragments * 512", self.partial_bytes),
            (f"{c}::kRounded", int(self.rounded)),
            (f"{c}::kStaged", int(self.staged)),
        )


@dataclass(frozen=True)
class DenseTile(Tile):
    """A tile of dense weights, for `narrow`, `wide` or `hopper`.

    groups  packed tiles along the inputs per stage (`wide`)
    """

    groups: int = 1

    @property
    def name(self) -> str:
        """Rows of activations x outputs per CTA."""
        return f"{self.tokens}x{self.outputs}" + ("-tma" if self.kernel == "hopper" else "")

    @property
    def stage_bytes(self) -> int:
        """Shared memory that one more stage costs a CTA."""
        if self.kernel == "narrow":  # eight rings of half groups
            scales = TILE_N * 2 * max(1, self.scale_rows // 2)
            return 8 * (TILE_N * TILE_K // 4 + scales + self.tokens * (TILE_K + 16))
        padding = 16 * self.tokens if self.kernel == "wide" else 16  # of rows; two barriers
        return (
            self.groups * (self.along_n * (TILE_N * TILE_K // 2 + TILE_N * 2 * self.scale_rows) + self.tokens * TILE_K * 2)
            + padding
        )

    def _cluster_bytes(self, capability: int) -> int:
        return self.partial_bytes if self.kernel == "narrow" else 0

    def _expression(self, stages: int, ctas: int) -> str:
        if self.kernel == "narrow":
            return f"Narrow<{self.n8}, {self.along_n}, {stages}, {ctas}, {self.scale_rows}>"
        return f"Wide<{self.n8}, {self.along_n}, {self.along_t}, {self.along_k}, {self.groups}, {stages}, {self.scale_rows}>"


@dataclass(frozen=True)
class StripTile(Tile):
    """The tile of `strip`, dense and sparse: a CTA holds all inputs of its tokens, and the sums of as many strips as fit."""

    _WARPS: ClassVar[int] = 16
    _FLOATS: ClassVar[int] = 20  # of a token's 16 sums of a fragment

    @property
    def outputs(self) -> int:
        """Half of a packed tile."""
        return TILE_N // 2

    @property
    def threads(self) -> int:
        """Threads per CTA."""
        return 32 * self._WARPS

    @property
    def name(self) -> str:
        """Rows of activations x outputs of a strip."""
        return f"{self.tokens}x{self.outputs}"

    def fits(self, m: int, k: int, capability: int) -> bool:
        """Whether all inputs of so many tokens fit, and the sums of a strip."""
        return self.bytes_for(m, k, 1) <= self.shared_bytes(capability)

    def bytes_for(self, m: int, k: int, strips: int) -> int:
        """Shared memory for the inputs of a CTA's tokens and the sums of so many strips."""
        tokens = min(m, self.tokens)
        return tokens * (k // TILE_K * (2 * TILE_K + 16) + strips * 2 * self._WARPS * self._FLOATS * 4)

    def shared_bytes(self, capability: int) -> int:
        """The most dynamic shared memory of a CTA; a launch takes what its shape needs."""
        return _SHARED_KIB.get(capability, 99) * 1024

    @property
    def stage_bytes(self) -> int:
        """Nothing: weights go to registers."""
        return 0

    def _cluster_bytes(self, capability: int) -> int:
        return 0

    def mirrors(self, capability: int) -> tuple[tuple[str, int], ...]:
        """Constants of the C++ type that Python computes as well."""
        c = self.expression(capability)
        return (
            (f"{c}::kTokens", self.tokens),
            (f"{c}::kOutputs", self.outputs),
            (f"{c}::kStripThreads", self.threads),
            (f"{c}::kRowBytes", 2 * TILE_K + 16),
            (f"{c}::kFragments * {c}::kStripWarps * {c}::kSumFloats", 2 * self._WARPS * self._FLOATS),
        )

    def stages(self, capability: int) -> int:
        """Packed tiles on their way to a warp; more gained nothing."""
        return 2

    def _expression(self, stages: int, ctas: int) -> str:
        return f"Strip<{stages}, {self.scale_rows}>"


TILES: dict[str, Tile] = {
    tile.name: tile
    for tile in (
        StripTile("strip", 1, 1),
        DenseTile("narrow", 1, 1, ctas_per_sm=2),
        DenseTile("narrow", 2, 1, ctas_per_sm=2),
        DenseTile("wide", 4, 2, groups=2),
        DenseTile("wide", 4, 4),
        DenseTile("wide", 4, 2, along_t=2),
        DenseTile("wide", 4, 4, along_t=2),
        DenseTile("hopper", 1, 2, ctas_per_sm=2),
        DenseTile("hopper", 1, 4),
        DenseTile("hopper", 2, 2, ctas_per_sm=2),
        DenseTile("hopper", 2, 4),
        DenseTile("hopper", 4, 2, ctas_per_sm=2),
        DenseTile("hopper", 4, 4),
        DenseTile("hopper", 8, 2),
        DenseTile("hopper", 8, 3, consumers=3),
        DenseTile("hopper", 8, 4),
        DenseTile("hopper", 8, 8),
        DenseTile("hopper", 16, 2),
        DenseTile("hopper", 16, 3, consumers=3),
        DenseTile("hopper", 16, 4),
    )
}
"""By name: rows of activations x outputs per CTA."""


_OPERANDS = {**ELEMENTS, torch.float8_e4m3fn: "E4m3"}
_PACKED = {
    "w4a16": ("kTileBytes", 4 * WORDS),
    "w24a16": ("kSparseTile", 3 * WORDS),
    "w4a8": ("kTileBytes", 4 * WORDS),
}  # bytes of a packed tile, by family


@cache
def dense_kernel(tile: str, dtype: torch.dtype, target: str, group: int) -> Kernel:
    """The kernel of a dense tile, for scales per `group` of inputs or, with 0, per output."""
    return product_kernel("w4a16", TILES[tile].for_group(group), dtype, target, group)


@cache
def dequantizing_kernel(family: str, dtype: torch.dtype, target: str, group: int = 0) -> Kernel:
    """What turns packed weights back to 16 bits."""
    group = group or TILE_K  # the same kernel serves weights with one scale per output
    parts = [*(["24"] if family == "w24a16" else []), *([f"g{group}"] if group < TILE_K else [])]
    types = types_of(dtype, dtype, dtype)
    return Kernel(
        "-".join(["dequantize", *parts, dtype_name(dtype)]),
        target,
        f"{family}/dequantize.cu",
        f"dequantize_kernel<{types}, {group}>" if family == "w4a16" else f"dequantize_kernel<{types}>",
        _THREADS,
        WEIGHTS,
        mirrors=_constants(family),
    )


def product_kernel(
    family: str, tile: Tile, dtype: torch.dtype, target: str, group: int, operand: torch.dtype | None = None
) -> Kernel:
    """What multiplies with a tile. Tensor cores see activations of type `operand`, or as they are."""
    capability = capability_of(target)
    return Kernel(
        "-".join([family, tile.name, dtype_name(dtype), f"g{group}" if group else "column"]),
        target,
        f"{family}/{tile.kernel}.cu",
        f"{tile.kernel}_kernel<{tile.expression(capability)}, {types_of(operand or dtype, operand or dtype, dtype)}, {group}>",
        tile.threads,
        HOPPER_PROBLEM if tile.kernel == "hopper" else PROBLEM,
        tile.shared_bytes(capability),
        overlaps=True,
        mirrors=(*_constants(family), *tile.mirrors(capability)),
    )


def types_of(activation: torch.dtype, operand: torch.dtype, output: torch.dtype) -> str:
    """The C++ types of activations, of what tensor cores multiply and of outputs; and the grid of the codes."""
    names = (_OPERANDS[dtype] for dtype in (activation, operand, output))
    return f"Types<{', '.join(names)}, Grid<{ZERO}, {LEVELS}>>"


def _constants(family: str) -> tuple[tuple[str, int], ...]:
    return ("kTileRows", TILE_N), ("kTileColumns", TILE_K), ("kThreads", _THREADS), _PACKED[family]


def dense_kernels(target: str) -> list[Kernel]:
    """Every dense kernel that exists for a target."""
    products = [dense_kernel(name, dtype, target, group) for name, dtype, group in choices(TILES, target, GROUP_SIZES)]
    return products + [dequantizing_kernel("w4a16", dtype, target, group) for dtype in ELEMENTS for group in GROUP_SIZES]


def choices(tiles: Mapping[str, Tile], target: str, groups: tuple[int, ...]) -> list[tuple[str, torch.dtype, int]]:
    """Every tile that exists for a target, with all types and kinds of scales."""
    names = [name for name, tile in tiles.items() if tile.runs_on(capability_of(target))]
    return [(name, dtype, group) for name in names for dtype in ELEMENTS for group in (*groups, 0)]
