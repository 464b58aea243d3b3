"""`marlin_tools::w4a16_linear`: activations in 16 bits, weights in 4, registered with torch.

Three rings: `operator.py` checks and chooses, plans and `runtime/driver.py` launch, `kernels/` computes. This file says what is
particular to dense weights, packed as in `layout.py`.
"""

from functools import partial

import torch
from torch import Tensor

from marlin_tools.ops.linear import dispatch, reference
from marlin_tools.ops.linear.hopper import HopperPlan
from marlin_tools.ops.linear.layout import WORDS, PackedWeight
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.plan import LEAST_BUSY, Partition, PartitionPlan, Plan
from marlin_tools.ops.linear.variants import OVERLAP_CAPABILITY, TILES, TileShape, Variant
from marlin_tools.ops.runtime import driver


def partition(tile: TileShape, tiles: int, groups: int, multiprocessors: int, capability: int) -> Partition:
    """Whole tiles per cluster of `split` blocks where that wastes little, else stream-K.

    Whole tiles need no sums over global memory, which cost some microseconds at the end of a kernel.
    """
    for split in (1, 2) if tile.kernel == "narrow" and capability >= OVERLAP_CAPABILITY else (1,):
        clusters = min(tiles, multiprocessors // split)
        rounds = -(-tiles // clusters)
        once = split == 1 or rounds == 1  # several tiles of a cluster cost more in its barriers than stream-K does
        if once and tiles * split >= LEAST_BUSY * rounds * multiprocessors and groups >= tile.along_k * split:
            return clusters * split, split, tiles
    return max(1, min(multiprocessors, tiles * groups)), 0, tiles * groups


def _variant(choice: str, dtype: torch.dtype, scales: Tensor) -> Variant:
    if choice == dispatch.CUBLAS:
        return Variant("dequantize", dtype)
    return Variant("w4a16", dtype, choice, grouped=scales.shape[1] > 1)


def _plan(choice: str, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> Plan:
    tile = TILES[choice]
    if tile.kernel == "hopper":
        return HopperPlan(tile, function, x, codes, out_features)
    return PartitionPlan(tile, partial(partition, tile), function, x, codes, out_features)


OPERATOR = LinearOperator("w4a16_linear", WORDS, dispatch.DENSE, _variant, _plan, reference.w4a16_linear)
prepare, multiply_with, dequantize = OPERATOR.prepare, OPERATOR.multiply_with, OPERATOR.dequantize
check, forget_plans = OPERATOR.check, OPERATOR.forget_plans


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias."""
    return OPERATOR(x, weight.codes, weight.scales, bias, weight.out_features, weight.exponent)
