"""`marlin_tools::w24a16_linear`: activations in 16 bits, weights 2:4 sparse in 4 bits, registered with torch.

The sparse counterpart of `w4a16.py`, which explains the rings; the packed weights are those of `sparse_layout.py`.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from marlin_tools.ops.linear import sparse_dispatch, sparse_reference
from marlin_tools.ops.linear.decomposition import Costs, Decomposition, decompositions
from marlin_tools.ops.linear.dispatch import CUBLAS
from marlin_tools.ops.linear.hopper import HopperPlan
from marlin_tools.ops.linear.layout import SPARSE_GROUP_SIZES, TILE_N
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.plan import LEAST_BUSY, LaunchPlan, PortablePlan, StripPlan
from marlin_tools.ops.linear.sparse_layout import WORDS, PackedSparse
from marlin_tools.ops.linear.sparse_tiles import SparseTile, sparse_kernel
from marlin_tools.ops.linear.tiles import StripTile, Tile, dequantizing_kernel
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import OVERLAP_CAPABILITY


class _Cycles(NamedTuple):
    """What the Hopper kernel's decompositions cost, fitted to measured times of all of them: a step of a packed tile by tokens,
    and at least; sums over CTAs through global memory and through a cluster, by the size of a CTA's tile relative to 128 x 256;
    and per CTA of a cluster.
    """

    per_token: float
    least: float
    shared: float
    shared_size: float
    split: float
    split_size: float
    split_each: float


_EXACT = _Cycles(3.5, 150.0, 4000.0, 20000.0, 1000.0, 2500.0, 600.0)
_ROUNDED = _Cycles(3.7, 130.0, 2500.0, 27500.0, 1300.0, 1200.0, 520.0)
_BAD_CLUSTERS = {7}  # always slower than of six: too few find seven partners while the kernel before still runs


class _SparseHopperPlan(HopperPlan):
    """The sparse Hopper kernel is launched like the dense one; what its steps and sums cost was measured on an H100."""

    def alternatives(self) -> list[Decomposition]:
        tiles, groups, sms, clusters = self._room()
        clusters = {size: count for size, count in clusters.items() if size not in _BAD_CLUSTERS}
        return decompositions(tiles, groups, sms, clusters)

    def _costs(self) -> Costs:
        tile = self._tile
        cycles = _ROUNDED if tile.rounded else _EXACT
        size = tile.outputs * tile.tokens / (128 * 256)
        step = tile.outputs / TILE_N * max(cycles.least, cycles.per_token * tile.tokens)
        shared, split = cycles.shared + cycles.shared_size * size, cycles.split + cycles.split_size * size
        return Costs(shared / step, split / step, cycles.split_each / step, super()._costs().shared_step)


def decompose(tile: SparseTile, tiles: int, groups: int, sms: int, capability: int) -> Decomposition:
    """Whole tiles, or one tile per cluster of `split` CTAs, where that wastes little, else stream-K.

    The first two need no sums over global memory, which cost some microseconds at the end of a kernel.
    """
    waves = -(-tiles // sms)
    if tiles >= LEAST_BUSY * waves * sms:
        return Decomposition(min(tiles, sms), 1, tiles)
    for split in range(2, tile.splits + 1) if capability >= OVERLAP_CAPABILITY else ():
        if LEAST_BUSY * sms <= tiles * split <= sms and groups >= tile.along_k * split:
            return Decomposition(tiles * split, split, tiles, tiles)
    return Decomposition(max(1, min(sms, tiles * groups)), 1, tiles, tiles)


def _kernel(choice: str, dtype: torch.dtype, group: int, target: str) -> Kernel:
    if choice == CUBLAS:
        return dequantizing_kernel("w24a16", dtype, target)
    return sparse_kernel(choice, dtype, target, group)


def _plan(tile: Tile, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> LaunchPlan:
    if tile.kernel == "hopper":
        return _SparseHopperPlan(tile, function, x, codes, out_features)
    if isinstance(tile, StripTile):
        return StripPlan(tile, function, x, codes, out_features)
    assert isinstance(tile, SparseTile)
    return PortablePlan(tile, partial(decompose, tile), function, x, codes, out_features)


OPERATOR = LinearOperator(
    "w24a16_linear", WORDS, sparse_dispatch.SPARSE, _kernel, _plan, sparse_reference.w24a16_linear, SPARSE_GROUP_SIZES
)
prepare_sparse, multiply_with, dequantize_sparse = OPERATOR.prepare, OPERATOR.multiply_with, OPERATOR.dequantize
check, forget_plans = OPERATOR.check, OPERATOR.forget_plans


def sparse_linear(x: Tensor, weight: PackedSparse, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias."""
    return OPERATOR(x, weight.codes, weight.scales, bias, weight.out_features, weight.exponent)
