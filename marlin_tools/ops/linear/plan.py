"""Launches of products with packed weights: what does not change from call to call is worked out once per shape, in a plan."""

import struct
import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.linear.variants import Tile, capability_of
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.scratch import COUNTER_BYTES, scratch_for

_PROBLEM = struct.Struct("7Q6i2I")  # `struct Problem` in problem.cuh

# Plans that a thread keeps, a kilobyte or two each: prompts come in many lengths, each with a plan per shape of weight.
_MOST_PLANS = 4096

LEAST_BUSY = 0.96
"""Share of the multiprocessors' time that a partition into whole tiles must use to be preferred to stream-K."""

Partition = tuple[int, int, int]
"""Blocks; how many of them split a tile, 0 for stream-K; the units that clusters share out: whole tiles, or steps."""


class Plan:
    """How to multiply activations of one shape with weights of one shape. Belongs to one thread."""

    _launch: driver.Launch
    _sizes: tuple[int, ...]  # what follows the addresses in the kernel's argument
    _partial_bytes: int

    def __init__(self, x: Tensor, out_features: int) -> None:
        self._device_index = x.device.index
        self._shape = (x.shape[0], out_features)

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, exponent: int) -> Tensor:
        """Launch on the current stream of the operands' device."""
        y = x.new_empty(self._shape)
        if self._device_index == torch._C._cuda_getDevice():  # noqa: SLF001  (the public function asks whether CUDA is set up)
            self._run(x, codes, scales, bias, y, exponent)
        else:
            with torch.cuda.device(self._device_index):
                self._run(x, codes, scales, bias, y, exponent)
        return y

    def _run(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, exponent: int) -> None:
        stream = driver.current_stream(self._device_index)
        scratch = scratch_for(self._device_index, stream, self._partial_bytes) if self._partial_bytes else 0
        self._launch(
            stream,
            *self._point(x),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch + COUNTER_BYTES,
            scratch,
            *self._sizes,
            *self._rounding(exponent),
        )

    def _point(self, x: Tensor) -> tuple[int, ...]:
        """The first fields of the argument: where the activations are."""
        return (x.data_ptr(),)

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        """The last fields: what a kernel that rounds weights must know of their exponent."""
        return ()


class PartitionPlan(Plan):
    """For the kernels that run on any GPU. `partition` deals out so many tiles of so many groups to so many multiprocessors."""

    def __init__(
        self,
        tile: Tile,
        partition: Callable[[int, int, int, int], Partition],
        function: driver.Function,
        x: Tensor,
        codes: Tensor,
        out_features: int,
    ) -> None:
        super().__init__(x, out_features)
        tiles_n, groups, _ = codes.shape
        token_tiles = -(-x.shape[0] // tile.tokens)
        tiles = token_tiles * -(-tiles_n // tile.along_n)
        assert tiles * groups < 2**31, (x.shape, codes.shape)
        capability = capability_of(function.target)
        blocks, split, units = partition(tiles, groups, multiprocessors(self._device_index), capability)
        clusters = blocks // max(1, split)
        self._launch = driver.Launch(function, _PROBLEM, blocks, max(1, split))
        self._sizes = (*self._shape, tiles_n, groups, token_tiles, split, *divmod(units, clusters))
        self._partial_bytes = 0 if split else 2 * blocks * tile.partial_bytes


class ThreadPlans(threading.local):
    """Plans by shape; their launch buffers must not be shared between threads."""

    def __init__(self) -> None:
        self.plans: dict[tuple[object, ...], Plan] = {}

    def keep(self, key: tuple[object, ...], plan: Plan) -> None:
        """Add one; the oldest leaves when there are too many."""
        if len(self.plans) >= _MOST_PLANS:
            del self.plans[next(iter(self.plans))]
        self.plans[key] = plan


@cache
def multiprocessors(device_index: int) -> int:
    """Of a device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count
