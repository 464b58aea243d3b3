"""Plans for the Hopper kernels, `kernels/w4a16/hopper.cu` and its counterparts."""

import struct
from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.linear.decomposition import Costs, Decomposition, best, decompositions
from marlin_tools.ops.linear.layout import TILE_N
from marlin_tools.ops.linear.plan import LaunchPlan, sm_count
from marlin_tools.ops.linear.tiles import Tile
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.scratch import COUNTER_BYTES
from marlin_tools.ops.runtime.target import capability_of
from marlin_tools.ops.runtime.tensor_map import TensorMap
from marlin_tools.quantized import ZERO

# Microseconds on an H100, fitted to the measured times of all decompositions: a step of a packed tile, by tokens (fewer if
# weights are rounded) and at least; then sums over CTAs, at all and by the size of a CTA's tile relative to 128 x 256, through
# global memory and through a cluster's shared memory (staged or not), there also for each CTA. Steps of stream-K take so many
# times as long, with activations of less than this part of the L2 cache, and of more.
_PER_TOKEN, _PER_TOKEN_ROUNDED, _LEAST = 0.0044, 0.0033, 0.096
_SHARED, _SHARED_SIZE = 4.0, 14.0
_SPLIT, _SPLIT_SIZE, _SPLIT_SIZE_STAGED, _SPLIT_EACH = 0.88, 6.4, 2.0, 0.57
_SHARED_STEP, _SHARED_STEP_UNCACHED, _CACHED = 1.02, 1.1, 0.8
_LARGEST_CLUSTER = 8  # that every Hopper GPU can start


class HopperPlan(LaunchPlan):
    """How the work is cut for CTAs is estimated to be the best of all ways."""

    def __init__(self, tile: Tile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> None:
        super().__init__(x, out_features)
        self._tile, self._function = tile, function
        self._m, self._k = x.shape
        self._tiles_n, self._groups, _ = codes.shape
        self._token_tiles = -(-self._m // tile.tokens)
        self.use(best(self.alternatives(), self._groups, self._costs()))

    def _room(self) -> tuple[int, int, int, dict[int, int]]:
        tiles = self._token_tiles * -(-self._tiles_n // self._tile.along_n)
        assert tiles * self._groups < 2**31, (tiles, self._groups)
        room = self._tile.stage_bytes * self._tile.stages(
            capability_of(self._function.kernel.target)
        )  # where a cluster's sums meet
        clusters = {
            split: driver.resident_clusters(self._function, split)
            for split in range(2, _LARGEST_CLUSTER + 1)
            if _pieces(self._tile, split) * -(-self._tile.n8 // split) * self._tile.outputs * 32 <= room
        }
        return tiles, self._groups, sm_count(self._device_index), clusters

    def _costs(self) -> Costs:
        cache = torch.cuda.get_device_properties(self._device_index).L2_cache_size
        return costs(self._tile, cached=self._m * self._k * self._tile.activation_bytes < _CACHED * cache)

    def alternatives(self) -> list[Decomposition]:
        """Every way to cut the work."""
        return decompositions(*self._room())

    def use(self, chosen: Decomposition) -> None:
        """Cut the work like this."""
        self.decomposition = chosen
        tile = self._tile
        assert chosen.ctas * tile.counters * 4 <= COUNTER_BYTES, (chosen, tile)
        self._launch = driver.Launch(self._function, chosen.ctas, chosen.split)
        self._map = TensorMap(self._launch.argument, self._m, self._k, tile.tokens, tile.activation_bytes)
        schedule = divmod(chosen.shared_tiles * self._groups, chosen.ctas)
        shape = (*self._shape, self._tiles_n, self._groups)
        self._sizes = (*shape, self._token_tiles, chosen.split, chosen.tiles, chosen.shared_tiles, *schedule)
        self._partial_bytes = 2 * chosen.ctas * tile.partial_bytes if chosen.stream_k else 0

    def _point(self, x: Tensor) -> tuple[int, ...]:
        """The tensor map lies before the fields."""
        self._map.point(x.data_ptr())
        return ()

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        return (*powers(exponent), 0)


@cache
def powers(exponent: int) -> tuple[int, float]:
    """Twice the float16 of minus the zero point times 2^-exponent, in one register, and 2^exponent."""
    (bits,) = struct.unpack("<H", struct.pack("<e", -ZERO * 2.0**-exponent))
    return bits * 0x10001, 2.0**exponent


def costs(tile: Tile, *, cached: bool = True) -> Costs:
    """What sums over CTAs cost with this tile, and whether the L2 cache holds the activations."""
    step = tile.outputs // TILE_N * max(_LEAST, (_PER_TOKEN_ROUNDED if tile.rounded else _PER_TOKEN) * tile.tokens)
    size = tile.outputs * tile.tokens / (256 * 128)
    split = _SPLIT + (_SPLIT_SIZE_STAGED if tile.staged else _SPLIT_SIZE) * size
    shared = (_SHARED + _SHARED_SIZE * size) / step
    return Costs(shared, split / step, _SPLIT_EACH / step, _SHARED_STEP if cached else _SHARED_STEP_UNCACHED)


def _pieces(tile: Tile, split: int) -> int:
    """Shares of a tile that a CTA of a cluster needs room for: what arrives, and where sums are staged what it sends."""
    return 2 * split - 1 if tile.staged else split
