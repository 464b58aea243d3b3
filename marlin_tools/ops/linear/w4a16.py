"""`marlin_tools::w4a16_linear`: activations in 16 bits, weights in 4, registered with torch.

Three rings: `operator.py` checks and chooses, plans and `runtime/driver.py` launch, `kernels/` computes. This file says what is
particular to dense weights, packed as in `layout.py`.
"""

from functools import partial

import torch
from torch import Tensor

from marlin_tools.ops.linear import dispatch, reference
from marlin_tools.ops.linear.decomposition import Decomposition
from marlin_tools.ops.linear.hopper import HopperPlan
from marlin_tools.ops.linear.layout import GROUP_SIZES, WORDS, PackedWeight
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.plan import LEAST_BUSY, LaunchPlan, PortablePlan, StripPlan
from marlin_tools.ops.linear.tiles import StripTile, Tile, dense_kernel, dequantizing_kernel
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import OVERLAP_CAPABILITY


def decompose(tile: Tile, tiles: int, groups: int, sms: int, capability: int) -> Decomposition:
    """Whole tiles, or one tile per cluster of `split` CTAs, where that wastes little, else stream-K.

    The first two need no sums over global memory, which cost some microseconds at the end of a kernel.
    """
    for split in (1, 2) if tile.kernel == "narrow" and capability >= OVERLAP_CAPABILITY else (1,):
        clusters = min(tiles, sms // split)
        waves = -(-tiles // clusters)
        once = split == 1 or waves == 1  # several tiles of a cluster cost more in its barriers than stream-K does
        if once and tiles * split >= LEAST_BUSY * waves * sms and groups >= tile.along_k * split:
            return Decomposition(clusters * split, split, tiles, tiles if split > 1 else 0)
    return Decomposition(max(1, min(sms, tiles * groups)), 1, tiles, tiles)


def _kernel(choice: str, dtype: torch.dtype, group: int, target: str) -> Kernel:
    if choice == dispatch.CUBLAS:
        return dequantizing_kernel("w4a16", dtype, target, group)
    return dense_kernel(choice, dtype, target, group)


def _plan(tile: Tile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> LaunchPlan:
    if tile.kernel == "hopper":
        return HopperPlan(tile, function, x, codes, out_features)
    if isinstance(tile, StripTile):
        return StripPlan(tile, function, x, codes, out_features)
    return PortablePlan(tile, partial(decompose, tile), function, x, codes, out_features)


OPERATOR = LinearOperator("w4a16_linear", WORDS, dispatch.DENSE, _kernel, _plan, reference.w4a16_linear, GROUP_SIZES)
prepare, multiply_with, dequantize = OPERATOR.prepare, OPERATOR.multiply_with, OPERATOR.dequantize
check, forget_plans = OPERATOR.check, OPERATOR.forget_plans


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias."""
    return OPERATOR(x, weight.codes, weight.scales, bias, weight.out_features, weight.exponent)
