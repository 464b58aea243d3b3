"""`marlin_tools::w4a8_linear`: activations rounded to float8, weights in 4 bits, registered with torch. Hopper and Ada.

The weights are those of `w4a16.py`, packed as there. Activations come in 16 bits and are rounded to e4m3, with a scale for each
token, by a kernel of their own; on Hopper the product starts while that one ends.
"""

import struct
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import fp8_reference, w4a16
from marlin_tools.ops.linear.decomposition import Costs, Decomposition
from marlin_tools.ops.linear.dispatch import CUBLAS, TableRow, Tables
from marlin_tools.ops.linear.fp8_tiles import FP8_GROUP_SIZES, FP8_TILES, fp8_kernel, round_kernel
from marlin_tools.ops.linear.hopper import HopperPlan
from marlin_tools.ops.linear.layout import MOST_ROUNDED, WORDS, PackedWeight
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.plan import LaunchPlan, PortablePlan
from marlin_tools.ops.linear.tiles import Tile, dequantizing_kernel
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import capability_of, target_of

FP8 = Tables(
    "dispatch-fp8.json",
    FP8_TILES,
    TableRow(4096, 4096, (512, 1024), ("128x128-fp8", "256x128-fp8")),
    TableRow(4096, 4096, (64,), ("64x256-ada",)),  # for every M: of as many bytes for a product, it pads fewer tokens
)

LEAST_ROWS = 256
"""From so many rows on this is faster than `w4a16.linear` wherever it was measured, on Hopper. With half as many it is slower
on one layer of eight, with a quarter on all. Nothing was measured on Ada, which follows.
"""

_TARGETS = ("sm_90a", "sm_89")
_ALIGNMENT = 16  # of activations: what a thread reads at once

# Microseconds: a step of 64 outputs by tokens; sums over CTAs, by the size of a CTA's tile relative to 128 x 256, through
# global memory and through a cluster's shared memory; and for each CTA of a cluster.
_PER_TOKEN, _SHARED, _SHARED_SIZE, _SPLIT, _SPLIT_SIZE, _SPLIT_EACH = 0.0018, 4.0, 14.0, 0.9, 2.0, 0.57


class _RoundingPlan(LaunchPlan):
    """Rounds the activations, then multiplies."""

    _round: driver.Launch
    _token_scales = 0

    def _round_for(self, function: driver.Function, x: Tensor) -> None:
        kernel = round_kernel(x.dtype, x.shape[1], function.kernel.target)
        self._round = driver.Launch(driver.loaded(kernel, x.device), x.shape[0])

    def _run(self, y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, exponent: int) -> None:
        if x.data_ptr() % _ALIGNMENT:
            raise DeviceError(
                f"activations begin at address {x.data_ptr():#x}",
                hint=f"they must begin at a multiple of {_ALIGNMENT} bytes: `x.clone()` does",
            )
        rounded = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        token_scales = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
        self._token_scales = token_scales.data_ptr()
        stream = driver.current_stream(self._device_index)
        self._round(stream, x.data_ptr(), rounded.data_ptr(), self._token_scales, x.shape[1])
        super()._run(y, rounded, codes, scales, bias, fp8_reference.COLUMN_EXPONENT if scales.shape[1] == 1 else exponent)


class Fp8Plan(_RoundingPlan, HopperPlan):
    """For Hopper."""

    def __init__(self, tile: Tile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> None:
        super().__init__(tile, function, x, codes, out_features)
        self._round_for(function, x)

    def _costs(self) -> Costs:
        tile = self._tile
        step, size = tile.outputs / 64 * _PER_TOKEN * tile.tokens, tile.outputs * tile.tokens / (256 * 128)
        shared, split = _SHARED + _SHARED_SIZE * size, _SPLIT + _SPLIT_SIZE * size
        return Costs(shared / step, split / step, _SPLIT_EACH / step, super()._costs().shared_step)

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        return (*_smaller_scales(exponent, self._groups), self._token_scales)


@cache
def _smaller_scales(exponent: int, groups: int) -> tuple[int, float]:
    """What scales are multiplied by, twice, as float16 in one register, and what sums are multiplied by in turn."""
    smaller = 2.0 ** fp8_reference.smaller_scales(exponent, groups)
    (bits,) = struct.unpack("<H", struct.pack("<e", smaller))
    return bits * 0x10001, 1 / smaller


class AdaPlan(_RoundingPlan, PortablePlan):
    """For Ada: whole tiles where that wastes little, else stream-K."""

    def __init__(
        self,
        decompose: Callable[[int, int, int, int], Decomposition],
        tile: Tile,
        function: driver.Function,
        x: Tensor,
        codes: Tensor,
        out_features: int,
    ) -> None:
        super().__init__(tile, decompose, function, x, codes, out_features)
        self._round_for(function, x)

    def _rounding(self, exponent: int) -> tuple[float, ...]:
        return (self._token_scales,)


def _kernel(choice: str, dtype: torch.dtype, group: int, target: str) -> Kernel:
    if choice == CUBLAS:
        return dequantizing_kernel("w4a16", dtype, target, group)
    if not FP8_TILES[choice].runs_on(capability_of(target)):
        raise DeviceError(f"`{choice}` does not run on `{target}`", hint="FP8 products need a Hopper or an Ada GPU")
    return fp8_kernel(choice, dtype, target, group)


def _plan(tile: Tile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> LaunchPlan:
    if tile.kernel == "hopper":
        return Fp8Plan(tile, function, x, codes, out_features)
    return AdaPlan(partial(w4a16.decompose, tile), tile, function, x, codes, out_features)


OPERATOR = LinearOperator("w4a8_linear", WORDS, FP8, _kernel, _plan, fp8_reference.w4a8_linear, FP8_GROUP_SIZES)
multiply_with, check, forget_plans = OPERATOR.multiply_with, OPERATOR.check, OPERATOR.forget_plans


def fp8_supported(device: torch.device, in_features: int, group_size: int) -> str | None:
    """Why `fp8_linear` cannot multiply with such a weight on a device, or None."""
    if group_size not in {*FP8_GROUP_SIZES, in_features}:
        return f"group_size {group_size} is neither {FP8_GROUP_SIZES[0]} nor all of the {in_features} inputs"
    if device.type == "cuda" and target_of(device) not in _TARGETS:
        return f"`{torch.cuda.get_device_name(device)}` is neither a Hopper nor an Ada GPU"
    return None


def operator_for(rows: int, exponent: int) -> LinearOperator:
    """What multiplies so many tokens whose linears read FP8. Few of them go to 16 bits, where nothing is lost; and so do all of
    a weight with a scale so large that float16 sums of other outputs would have few bits.
    """
    return OPERATOR if rows >= LEAST_ROWS and exponent <= MOST_ROUNDED else w4a16.OPERATOR


def prepare_fp8(weight: PackedWeight, dtype: torch.dtype) -> None:
    """Compile and load every kernel that may be chosen for this weight, whatever M: call it before a graph capture."""
    device = weight.codes.device
    driver.loaded(round_kernel(dtype, weight.in_features, target_of(device)), device)
    OPERATOR.prepare(weight, dtype)


def fp8_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K], rounded to e4m3 token by token, times the weight, transposed, plus bias."""
    return OPERATOR(x, weight.codes, weight.scales, bias, weight.out_features, weight.exponent)
