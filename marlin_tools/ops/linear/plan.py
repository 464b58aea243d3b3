"""Launches of products with packed weights: what does not change from call to call is worked out once per shape, in a plan."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.linear.decomposition import Decomposition
from marlin_tools.ops.linear.layout import TILE_N
from marlin_tools.ops.linear.tiles import StripTile, Tile
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.scratch import COUNTER_BYTES, scratch_for
from marlin_tools.ops.runtime.target import capability_of

LEAST_BUSY = 0.96
"""Share of the SMs' time that whole tiles must use to be preferred to stream-K."""


class LaunchPlan:
    """How to multiply activations of one shape with weights of one shape. Belongs to one thread."""

    _launch: driver.Launch
    _sizes: tuple[int, ...]  # what follows the addresses in the kernel's argument
    _partial_bytes: int

    def __init__(self, x: Tensor, out_features: int) -> None:
        self._device_index = x.device.index
        self._shape = (x.shape[0], out_features)

    def __call__(self, y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, exponent: int) -> None:
        """Launch on the current stream of the operands' device; `y` is written."""
        if self._device_index == torch._C._cuda_getDevice():  # noqa: SLF001  (the public function asks whether CUDA is set up)
            self._run(y, x, codes, scales, bias, exponent)
        else:
            with torch.cuda.device(self._device_index):
                self._run(y, x, codes, scales, bias, exponent)

    def _run(self, y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, exponent: int) -> None:
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
        """The last fields: what a kernel that rounds weights must know of their exponent, and of rounded activations."""
        return ()


class PortablePlan(LaunchPlan):
    """For the kernels that run on any GPU. `decompose` cuts so many tiles of so many steps for so many SMs of a capability."""

    def __init__(
        self,
        tile: Tile,
        decompose: Callable[[int, int, int, int], Decomposition],
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
        way = decompose(tiles, groups, sm_count(self._device_index), capability_of(function.kernel.target))
        assert way.ctas * tile.counters * 4 <= COUNTER_BYTES, (way, tile)
        self._launch = driver.Launch(function, way.ctas, way.split)
        schedule = divmod(tiles * groups if way.stream_k else tiles, way.ctas // way.split)
        self._sizes = (*self._shape, tiles_n, groups, token_tiles, 0 if way.stream_k else way.split, *schedule)
        self._partial_bytes = 2 * way.ctas * tile.partial_bytes if way.stream_k else 0

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        return (0,)


class StripPlan(LaunchPlan):
    """For `strip`: the strips of all outputs divide over the SMs, once for every eight tokens."""

    def __init__(self, tile: StripTile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> None:
        super().__init__(x, out_features)
        m, k = x.shape
        capability = capability_of(function.kernel.target)
        if not tile.fits(m, k, capability):
            raise ValueError(f"{m} rows of {k} inputs do not fit into the shared memory of a CTA")
        tiles_n, groups, _ = codes.shape
        token_tiles, strips = -(-m // tile.tokens), tiles_n * (TILE_N // tile.outputs)
        ctas = min(strips, sm_count(self._device_index))
        shared = min(tile.bytes_for(m, k, -(-strips // ctas)), tile.shared_bytes(capability))
        self._launch = driver.Launch(function, ctas * token_tiles, shared_bytes=shared)
        self._sizes = (*self._shape, tiles_n, groups, token_tiles, ctas, *divmod(strips, ctas))
        self._partial_bytes = 0

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        return (0,)


@cache
def sm_count(device_index: int) -> int:
    """Of a device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count
