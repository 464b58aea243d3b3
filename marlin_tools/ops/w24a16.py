"""`marlin_tools::w24a16_linear`: activations in 16 bits, weights 2:4 sparse in 4 bits, registered with torch.

The sparse counterpart of `w4a16.py`, which explains the rings; the packed weights are those of `sparse_layout.py`.
"""

from functools import partial

import torch
from torch import Tensor

from marlin_tools.ops import driver, sparse_dispatch, sparse_reference
from marlin_tools.ops.deal import Costs, Deal, deals
from marlin_tools.ops.dispatch import CUBLAS
from marlin_tools.ops.hopper import HopperPlan
from marlin_tools.ops.layout import TILE_N
from marlin_tools.ops.linear_operator import LinearOperator
from marlin_tools.ops.plan import LEAST_BUSY, Partition, PartitionPlan, Plan
from marlin_tools.ops.sparse_layout import WORDS, PackedSparse
from marlin_tools.ops.sparse_variants import SPARSE_TILES, SparseTile, SparseVariant
from marlin_tools.ops.variants import OVERLAP_CAPABILITY

# Of the Hopper kernel, in cycles, fitted to measured times of all deals: a packed tile and group by tokens, and at least; sums
# over blocks through global memory and through a cluster, by the size of a block's tile relative to 128 x 256; and per block of
# a cluster. Clusters of seven were always slower than of six: too few find seven partners while the kernel before still runs.
_PER_TOKEN, _LEAST, _SHARED, _SHARED_SIZE, _SPLIT, _SPLIT_SIZE, _SPLIT_EACH = 3.5, 150.0, 4000.0, 20000.0, 1000.0, 2500.0, 600.0
_BAD_CLUSTERS = {7}


class _SparseHopperPlan(HopperPlan):
    """The sparse Hopper kernel is launched like the dense one; what its steps and sums cost was measured on an H100."""

    def alternatives(self) -> list[Deal]:
        tiles, groups, places, clusters = self._room()
        return deals(tiles, groups, places, {size: count for size, count in clusters.items() if size not in _BAD_CLUSTERS})

    def _costs(self) -> Costs:
        tile = self._tile
        size = tile.outputs * tile.tokens / (128 * 256)
        step = tile.outputs / TILE_N * max(_LEAST, _PER_TOKEN * tile.tokens)
        shared, split = _SHARED + _SHARED_SIZE * size, _SPLIT + _SPLIT_SIZE * size
        return Costs(shared=shared / step, split=split / step, split_each=_SPLIT_EACH / step)


def partition(tile: SparseTile, tiles: int, groups: int, multiprocessors: int, capability: int) -> Partition:
    """Whole tiles, or one tile per cluster of `split` blocks, where that wastes little, else steps of one group: stream-K.

    The first two need no sums over global memory, which cost some microseconds at the end of a kernel.
    """
    rounds = -(-tiles // multiprocessors)
    if tiles >= LEAST_BUSY * rounds * multiprocessors:
        return min(tiles, multiprocessors), 1, tiles
    for split in range(2, tile.splits + 1) if capability >= OVERLAP_CAPABILITY else ():
        if LEAST_BUSY * multiprocessors <= tiles * split <= multiprocessors and groups >= tile.along_k * split:
            return tiles * split, split, tiles
    return max(1, min(multiprocessors, tiles * groups)), 0, tiles * groups


def _variant(choice: str, dtype: torch.dtype, scales: Tensor) -> SparseVariant:
    if choice == CUBLAS:
        return SparseVariant("dequantize-24", dtype)
    return SparseVariant("w24a16", dtype, choice, grouped=scales.shape[1] > 1)


def _plan(choice: str, function: driver.Function, x: Tensor, codes: Tensor, out_features: int) -> Plan:
    tile = SPARSE_TILES[choice]
    if tile.kernel == "hopper":
        return _SparseHopperPlan(tile, function, x, codes, out_features)
    return PartitionPlan(tile, partial(partition, tile), function, x, codes, out_features)


OPERATOR = LinearOperator("w24a16_linear", WORDS, sparse_dispatch.SPARSE, _variant, _plan, sparse_reference.w24a16_linear)
prepare_sparse, multiply_with, dequantize_sparse = OPERATOR.prepare, OPERATOR.multiply_with, OPERATOR.dequantize
check, forget_plans = OPERATOR.check, OPERATOR.forget_plans


def sparse_linear(x: Tensor, weight: PackedSparse, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias."""
    return OPERATOR(x, weight.codes, weight.scales, bias, weight.out_features)
