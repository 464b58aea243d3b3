"""Launching `kernels/w4a16/hopper.cu`: what does not change from call to call is worked out once per shape, in a plan."""

import struct
from typing import Protocol

import torch
from torch import Tensor

from marlin_tools.ops import driver
from marlin_tools.ops.deal import Costs, Deal, best, deals
from marlin_tools.ops.layout import TILE_N
from marlin_tools.ops.scratch import COUNTER_BYTES, scratch_for
from marlin_tools.ops.tensor_map import BYTES, TensorMap
from marlin_tools.ops.variants import capability_of

_PROBLEM = struct.Struct("6Q8i2I8x")  # `struct HopperProblem` in stretch.cuh behind its tensor map

# Microseconds on an H100, fitted to the measured times of all deals: a packed tile and group, by tokens and at least; then sums
# over blocks, at all and by the size of a block's tile relative to 128 x 256, through global memory and through a cluster's
# shared memory, there also for each block.
_PER_TOKEN, _LEAST = 0.0044, 0.096
_SHARED, _SHARED_SIZE = 6.0, 14.0
_SPLIT, _SPLIT_SIZE, _SPLIT_EACH = 0.88, 6.4, 0.57
_LARGEST_CLUSTER = 8  # that every Hopper GPU can start


class HopperTile(Protocol):
    """How a block of such a kernel cuts its work."""

    @property
    def blocks(self) -> int:
        """N8 blocks of tokens per warpgroup."""

    @property
    def along_n(self) -> int:
        """Packed tiles of 64 outputs side by side."""

    @property
    def tokens(self) -> int:
        """Rows of the activations per block."""

    @property
    def outputs(self) -> int:
        """Outputs per block."""

    @property
    def slot_bytes(self) -> int:
        """Shared memory per slot."""

    @property
    def partial_bytes(self) -> int:
        """Float32 sums of one tile."""

    def slots(self, capability: int) -> int:
        """Slots of the ring."""


class HopperPlan:
    """How to multiply activations of one shape with weights of one shape. Belongs to one thread."""

    def __init__(self, tile: HopperTile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> None:
        self._tile, self._function = tile, function
        self._m, self._k = x.shape
        self._n = out_features
        self._tiles_n, self._groups, _ = codes.shape
        self._device_index = x.device.index
        self._token_tiles = -(-self._m // tile.tokens)
        self.use(best(self.alternatives(), self._groups, self._costs()))

    def _room(self) -> tuple[int, int, int, dict[int, int]]:
        tiles = self._token_tiles * -(-self._tiles_n // self._tile.along_n)
        assert tiles * self._groups < 2**31, (tiles, self._groups)
        room = self._tile.slot_bytes * self._tile.slots(capability_of(self._function.target))  # where a cluster's sums meet
        places = torch.cuda.get_device_properties(self._device_index).multi_processor_count
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
        shape = (self._m, self._n, self._tiles_n, self._groups)
        self._sizes = (*shape, self._token_tiles, chosen.split, chosen.tiles, chosen.shared_tiles, *schedule)
        self._partial_bytes = 2 * chosen.units * tile.partial_bytes if chosen.shared_tiles else 0

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Launch on the current stream of the operands' device."""
        y = x.new_empty((self._m, self._n))
        if self._device_index == torch.cuda.current_device():
            self._run(x, codes, scales, bias, y)
        else:
            with torch.cuda.device(self._device_index):
                self._run(x, codes, scales, bias, y)
        return y

    def _run(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
        stream = driver.current_stream(self._device_index)
        scratch = scratch_for(self._device_index, stream, self._partial_bytes) if self._partial_bytes else 0
        self._map.point(x.data_ptr())
        self._launch(
            stream,
            codes.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch + COUNTER_BYTES,
            scratch,
            *self._sizes,
        )


def costs(tile: HopperTile) -> Costs:
    """What sums over blocks cost with this tile."""
    step = tile.outputs // TILE_N * max(_LEAST, _PER_TOKEN * tile.tokens)
    size = tile.outputs * tile.tokens / (256 * 128)
    return Costs((_SHARED + _SHARED_SIZE * size) / step, (_SPLIT + _SPLIT_SIZE * size) / step, _SPLIT_EACH / step)
