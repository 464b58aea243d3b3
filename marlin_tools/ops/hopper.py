"""Plans for the Hopper kernels, `kernels/w4a16/hopper.cu` and its sparse counterpart."""

import struct

from torch import Tensor

from marlin_tools.ops import driver
from marlin_tools.ops.deal import Costs, Deal, best, deals
from marlin_tools.ops.layout import TILE_N
from marlin_tools.ops.plan import Plan, multiprocessors
from marlin_tools.ops.tensor_map import BYTES, TensorMap
from marlin_tools.ops.variants import Tile, capability_of

_PROBLEM = struct.Struct("6Q8i2I8x")  # `struct HopperProblem` in stretch.cuh behind its tensor map

# Microseconds on an H100, fitted to the measured times of all deals: a packed tile and group, by tokens and at least; then sums
# over blocks, at all and by the size of a block's tile relative to 128 x 256, through global memory and through a cluster's
# shared memory, there also for each block.
_PER_TOKEN, _LEAST = 0.0044, 0.096
_SHARED, _SHARED_SIZE = 6.0, 14.0
_SPLIT, _SPLIT_SIZE, _SPLIT_EACH = 0.88, 6.4, 0.57
_LARGEST_CLUSTER = 8  # that every Hopper GPU can start


class HopperPlan(Plan):
    """How the work is dealt to blocks is estimated to be the best of all ways."""

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
        room = self._tile.slot_bytes * self._tile.slots(capability_of(self._function.target))  # where a cluster's sums meet
        places = multiprocessors(self._device_index)
        clusters = {
            split: driver.resident_clusters(self._function, split)
            for split in range(2, _LARGEST_CLUSTER + 1)
            if split * -(-self._tile.blocks // split) * self._tile.outputs * 32 <= room
        }
        return tiles, self._groups, places, clusters

    def _costs(self) -> Costs:
        return costs(self._tile)

    def alternatives(self) -> list[Deal]:
        """Every way to deal the work out."""
        return deals(*self._room())

    def use(self, chosen: Deal) -> None:
        """Deal the work out like this."""
        self.deal = chosen
        tile, layout = self._tile, _PROBLEM
        self._launch = driver.Launch(self._function, layout, chosen.units, chosen.split, lead=BYTES)
        self._map = TensorMap(self._launch.argument, self._m, self._k, tile.tokens)
        schedule = divmod(chosen.shared_tiles * self._groups, chosen.units)
        shape = (*self._shape, self._tiles_n, self._groups)
        self._sizes = (*shape, self._token_tiles, chosen.split, chosen.tiles, chosen.shared_tiles, *schedule)
        self._partial_bytes = 2 * chosen.units * tile.partial_bytes if chosen.shared_tiles else 0

    def _point(self, x: Tensor) -> tuple[int, ...]:
        """The tensor map lies before the fields."""
        self._map.point(x.data_ptr())
        return ()


def costs(tile: Tile) -> Costs:
    """What sums over blocks cost with this tile."""
    step = tile.outputs // TILE_N * max(_LEAST, _PER_TOKEN * tile.tokens)
    size = tile.outputs * tile.tokens / (256 * 128)
    return Costs((_SHARED + _SHARED_SIZE * size) / step, (_SPLIT + _SPLIT_SIZE * size) / step, _SPLIT_EACH / step)
