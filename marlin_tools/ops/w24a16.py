"""`marlin_tools::w24a16_linear`: activations in 16 bits, weights 2:4 sparse in 4 bits, registered with torch.

The sparse counterpart of `w4a16.py`, which explains the rings; the packed weights are those of `sparse_layout.py`.

Shapes: x [M, K], codes int32 [tiles, K/128, 768], scales float16 [tiles, K/128 or 1, 64], bias [N], y [M, N], N <= 64 tiles.
"""

import struct
import threading
from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops import driver, sparse_dispatch, sparse_reference
from marlin_tools.ops.deal import Costs, Deal, deals
from marlin_tools.ops.dispatch import CUBLAS
from marlin_tools.ops.hopper import HopperPlan
from marlin_tools.ops.layout import TILE_K, TILE_N
from marlin_tools.ops.scratch import COUNTER_BYTES, scratch_for
from marlin_tools.ops.sparse_layout import WORDS, PackedSparse
from marlin_tools.ops.sparse_variants import SPARSE_TILES, SparseTile, SparseVariant
from marlin_tools.ops.variants import ELEMENTS, OVERLAP_CAPABILITY, capability_of, target_of

_PROBLEM = struct.Struct("7Q6i2I")  # `struct Problem` in problem.cuh
_WEIGHTS = struct.Struct("3Q3i4x")  # `struct Weights` in dequantize.cu

# Weights that are dequantised and multiplied at once on the cuBLAS path: a bound on the scratch memory.
_CUBLAS_CHUNK_BYTES = 512 << 20

# Share of the multiprocessors' time that a partition into whole tiles must use to be preferred.
_LEAST_BUSY = 0.96

# Plans that a thread keeps, a kilobyte or two each: prompts come in many lengths, each with a plan per shape of weight.
_MOST_PLANS = 4096

# Of the Hopper kernel, in cycles, fitted to measured times of all deals: a packed tile and group by tokens, and at least; sums
# over blocks through global memory and through a cluster, by the size of a block's tile relative to 128 x 256; and per block of
# a cluster. Clusters of seven were always slower than of six: too few find seven partners while the kernel before still runs.
_PER_TOKEN, _LEAST, _SHARED, _SHARED_SIZE, _SPLIT, _SPLIT_SIZE, _SPLIT_EACH = 3.5, 150.0, 4000.0, 20000.0, 1000.0, 2500.0, 600.0
_BAD_CLUSTERS = {7}

_library = torch.library.Library("marlin_tools", "FRAGMENT")
_library.define("w24a16_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int out_features) -> Tensor")


def sparse_linear(x: Tensor, weight: PackedSparse, bias: Tensor | None = None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias."""
    y: Tensor = torch.ops.marlin_tools.w24a16_linear(x, weight.codes, weight.scales, bias, weight.out_features)
    return y


def prepare_sparse(weight: PackedSparse, dtype: torch.dtype) -> None:
    """Compile and load every kernel that `sparse_linear` may choose for this weight: call it before a graph capture."""
    device = weight.codes.device
    for choice in sparse_dispatch.possible(_target(device.index), weight.out_features, weight.in_features):
        driver.loaded(_variant(choice, dtype, grouped=weight.scales.shape[1] > 1), device)
    torch.cuda.synchronize(device)  # the kernels fetch weights ahead of stream order: these must be complete


def multiply_with(
    choice: str, x: Tensor, weight: PackedSparse, bias: Tensor | None = None, target: str | None = None
) -> Tensor:
    """`sparse_linear` with a named tile or `cublas`, and perhaps compiled for another target."""
    check(x, weight.codes, weight.scales, bias, weight.out_features)
    if choice == CUBLAS:
        return _through_cublas(x, weight.codes, weight.scales, bias, weight.out_features)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.out_features))
    plan = _plan_for(choice, x, weight.codes, weight.scales, weight.out_features, target or _target(x.device.index))
    return plan(x, weight.codes, weight.scales, bias)


def dequantize_sparse(weight: PackedSparse, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] on its device, equal to `QuantizedLinear.dequantize`."""
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.codes.device)
    with torch.cuda.device(out.device):
        _dequantize_rows(weight.codes, weight.scales, out)
    return out


def check(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Refuse, by name, what the kernels cannot read."""
    groups = _check_weight(codes, scales, out_features)
    if x.dtype not in ELEMENTS:
        raise TypeError(f"x must be float16 or bfloat16, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != groups * TILE_K:
        raise ValueError(f"x must be [M, {groups * TILE_K}], got {list(x.shape)}")
    for name, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    for name, tensor in (("x", x), ("codes", codes), ("scales", scales), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (out_features,)):
        raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")


def _check_weight(codes: Tensor, scales: Tensor, out_features: int) -> int:
    if codes.dtype != torch.int32 or codes.ndim != 3 or codes.shape[2] != WORDS:
        raise ValueError(f"codes must be int32 [N/64, K/128, {WORDS}], got {codes.dtype} {list(codes.shape)}")
    tiles, groups, _ = codes.shape
    if scales.dtype != torch.float16 or scales.ndim != 3 or scales.shape not in {(tiles, groups, TILE_N), (tiles, 1, TILE_N)}:
        raise ValueError(f"scales must be float16 [{tiles}, {groups} or 1, {TILE_N}], got {scales.dtype} {list(scales.shape)}")
    if not (tiles - 1) * TILE_N < out_features <= tiles * TILE_N:
        raise ValueError(f"out_features {out_features} does not fit {tiles} tiles of {TILE_N}")
    return groups


# ---- implementations ------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "w24a16_linear", "CPU")
def _on_cpu(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    check(x, codes, scales, bias, out_features)
    return sparse_reference.w24a16_linear(x, codes, scales, bias, out_features)


@torch.library.register_fake("marlin_tools::w24a16_linear")  # type: ignore[untyped-decorator]
def _fake(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], out_features))


@torch.library.impl(_library, "w24a16_linear", "CUDA")
def _on_cuda(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    if x.shape[0] == 0:
        check(x, codes, scales, bias, out_features)
        return x.new_empty((0, out_features))
    # Shapes and types that were checked once are recognised by their plan; what is left is checked every time.
    key = (x.shape, x.dtype, x.device, codes.shape, codes.dtype, scales.shape, scales.dtype, out_features)
    plan = _thread.plans.get(key)
    if (
        plan is None
        or bias is not None
        or not (x.is_contiguous() and codes.is_contiguous() and scales.is_contiguous())
        or not (codes.device == scales.device == x.device)
    ):
        check(x, codes, scales, bias, out_features)
    if plan is None:
        plan = _make_plan(x, codes, scales, out_features)
        if plan is None:
            return _through_cublas(x, codes, scales, bias, out_features)
        _thread.keep(key, plan)
    return plan(x, codes, scales, bias)


def _make_plan(x: Tensor, codes: Tensor, scales: Tensor, out_features: int) -> "_Plan | HopperPlan | None":
    """How to multiply, or None for cuBLAS."""
    from marlin_tools.ops.selftest import require_trust  # it tests this module

    require_trust(x.device.index)
    target = _target(x.device.index)
    choice = sparse_dispatch.choose(target, x.shape[0], out_features, x.shape[1])
    if choice == CUBLAS:
        return None
    return _plan_for(choice, x, codes, scales, out_features, target)


def _plan_for(choice: str, x: Tensor, codes: Tensor, scales: Tensor, out_features: int, target: str) -> "_Plan | HopperPlan":
    tile = SPARSE_TILES[choice]
    if tile.kernel != "hopper":
        return _Plan(choice, x, codes, scales, out_features, target)
    function = driver.loaded(_variant(choice, x.dtype, grouped=scales.shape[1] > 1), x.device, target)
    return _SparseHopperPlan(tile, function, x, codes, out_features)


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


class _Plan:
    """Everything about a launch that does not change from call to call. Belongs to one thread."""

    def __init__(self, tile_name: str, x: Tensor, codes: Tensor, scales: Tensor, out_features: int, target: str) -> None:
        tile = SPARSE_TILES[tile_name]
        m = x.shape[0]
        tiles_n, groups, _ = codes.shape
        token_tiles = -(-m // tile.tokens)
        tiles = token_tiles * -(-tiles_n // tile.along_n)
        assert tiles * groups < 2**31, (m, codes.shape)
        blocks, split, units = partition(tile, tiles, groups, _multiprocessors(x.device.index), capability_of(target))
        clusters = blocks // max(1, split)
        self._device_index = x.device.index
        self._shape = (m, out_features)
        variant = _variant(tile_name, x.dtype, grouped=scales.shape[1] > 1)
        self._launch = driver.Launch(driver.loaded(variant, x.device, target), _PROBLEM, blocks, max(1, split))
        self._sizes = (m, out_features, tiles_n, groups, token_tiles, split, units // clusters, units % clusters)
        self._partial_bytes = 2 * blocks * tile.partial_bytes

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Launch on the current stream of the operands' device."""
        y = x.new_empty(self._shape)
        if self._device_index == torch.cuda.current_device():
            self._run(x, codes, scales, bias, y)
        else:
            with torch.cuda.device(self._device_index):
                self._run(x, codes, scales, bias, y)
        return y

    def _run(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
        stream = driver.current_stream(self._device_index)
        scratch = scratch_for(self._device_index, stream, self._partial_bytes)
        self._launch(
            stream,
            x.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch + COUNTER_BYTES,
            scratch,
            *self._sizes,
        )


def partition(tile: SparseTile, tiles: int, groups: int, multiprocessors: int, capability: int) -> tuple[int, int, int]:
    """(blocks, split, units to share out): whole tiles, or one tile per cluster of `split` blocks, where that wastes little,
    else steps of one group: stream-K.

    The first two need no sums over global memory, which cost some microseconds at the end of a kernel.
    """
    rounds = -(-tiles // multiprocessors)
    if tiles >= _LEAST_BUSY * rounds * multiprocessors:
        return min(tiles, multiprocessors), 1, tiles
    for split in range(2, tile.splits + 1) if capability >= OVERLAP_CAPABILITY else ():
        if _LEAST_BUSY * multiprocessors <= tiles * split <= multiprocessors and groups >= tile.along_k * split:
            return tiles * split, split, tiles
    return max(1, min(multiprocessors, tiles * groups)), 0, tiles * groups


def _through_cublas(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Dequantise some outputs' weights, multiply, next outputs: for many rows, where the tensor cores are the limit."""
    m, k = x.shape
    y = torch.empty((m, out_features), dtype=x.dtype, device=x.device)
    tiles_at_once = max(1, _CUBLAS_CHUNK_BYTES // (2 * k * TILE_N))
    chunks = -(-codes.shape[0] // tiles_at_once)
    tiles_at_once = -(-codes.shape[0] // chunks)
    weight = torch.empty((min(out_features, tiles_at_once * TILE_N), k), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        for tile in range(0, codes.shape[0], tiles_at_once):
            first, last = tile * TILE_N, min((tile + tiles_at_once) * TILE_N, out_features)
            rows = weight[: last - first]
            _dequantize_rows(codes[tile : tile + tiles_at_once], scales[tile : tile + tiles_at_once], rows)
            if bias is None:
                torch.mm(x, rows.T, out=y[:, first:last])
            else:
                torch.addmm(bias[first:last], x, rows.T, out=y[:, first:last])
    return y


def _dequantize_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    tiles, groups, _ = codes.shape
    launch = driver.Launch(driver.loaded(SparseVariant("dequantize-24", out.dtype), out.device), _WEIGHTS, tiles * groups)
    stream = driver.current_stream(out.device.index)
    launch(stream, codes.data_ptr(), scales.data_ptr(), out.data_ptr(), groups, scales.shape[1], out.shape[0])


def _variant(choice: str, dtype: torch.dtype, *, grouped: bool) -> SparseVariant:
    if choice == CUBLAS:
        return SparseVariant("dequantize-24", dtype)
    return SparseVariant("w24a16", dtype, choice, grouped)


class _ThreadPlans(threading.local):
    """Plans by shape; their launch buffers must not be shared between threads."""

    def __init__(self) -> None:
        self.plans: dict[tuple[object, ...], _Plan | HopperPlan] = {}

    def keep(self, key: tuple[object, ...], plan: _Plan | HopperPlan) -> None:
        """Add one; the oldest leaves when there are too many."""
        if len(self.plans) >= _MOST_PLANS:
            del self.plans[next(iter(self.plans))]
        self.plans[key] = plan


_thread = _ThreadPlans()


def forget_plans() -> None:
    """Choose anew: the dispatch tables changed."""
    _thread.plans.clear()


@cache
def _target(device_index: int) -> str:
    return target_of(torch.device("cuda", device_index))


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
