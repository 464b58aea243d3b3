"""Operators `y = x W^T + bias` on packed weights, registered with torch: what the dense and the sparse one have in common.

An operator is functional, has a fake for tracing and a CPU implementation in plain torch, and works in CUDA graphs and under
`torch.compile(fullgraph=True)`. On a GPU it checks its operands, takes the kernel that the dispatch table names for the shape,
and launches it by a plan that it keeps.

Shapes: x [M, K], codes int32 [tiles, K/128, words], scales float16 [tiles, K/G, 64], bias [N], y [M, N], N <= 64 tiles;
the exponent is that of `layout.exponent_of`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from marlin_tools.ops.linear.dispatch import CUBLAS, Tables, gpu_of
from marlin_tools.ops.linear.layout import LEAST_EXPONENT, MOST_EXPONENT, MOST_ROUNDED, TILE_K, TILE_N, PackedTiles
from marlin_tools.ops.linear.plan import LaunchPlan
from marlin_tools.ops.linear.trust import require_trust
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import ELEMENTS, Kernel
from marlin_tools.ops.runtime.target import target_of

# Weights that are dequantised and multiplied at once on the cuBLAS path: a bound on the scratch memory. (Chunks small enough to
# stay in the L2 cache were measured, and are slower: cuBLAS then has too few tiles to fill the GPU.)
_CUBLAS_CHUNK_BYTES = 512 << 20

_library = torch.library.Library("marlin_tools", "DEF")
_dispatch_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001
"""How many are active. The public way to ask makes a list of them."""


class LinearOperator:
    """`marlin_tools::<name>`.

    words      int32 of a packed tile
    tables     which kernel multiplies
    kernel     the one for a choice, a type of activations, a group of inputs and a target; for cuBLAS the one that dequantises
    plan       how a tile's kernel is launched for x, codes and a number of outputs
    groups     how many inputs may share a scale
    reference  the operation in plain torch
    """

    def __init__(
        self,
        name: str,
        words: int,
        tables: Tables,
        kernel: Callable[[str, torch.dtype, int, str], Kernel],
        plan: Callable[[Any, driver.Function, Tensor, Tensor, int], LaunchPlan],
        reference: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor],
        groups: tuple[int, ...],
    ) -> None:
        self._groups = groups
        self._words, self._tables, self._kernel, self._plan, self._reference = words, tables, kernel, plan, reference
        _library.define(
            f"{name}(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int out_features, int exponent) -> Tensor"
        )
        _library.impl(name, self.on_cpu, "CPU")
        _library.impl(name, self.on_cuda, "CUDA")
        torch.library.register_fake(f"marlin_tools::{name}", _fake, lib=_library)
        self._registered: Callable[..., Tensor] = getattr(torch.ops.marlin_tools, name)

    def __call__(
        self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, exponent: int
    ) -> Tensor:
        """The operation, for eager code without torch's dispatcher: that costs as much as the launch of a kernel.

        Whoever wants to see the operator still does: tracers, dispatch modes, tensor subclasses, and autograd, to refuse it.
        """
        if (
            not is_compiling()
            and type(x) is Tensor
            and x.is_cuda
            and not (x.requires_grad and torch.is_grad_enabled())
            and not _dispatch_modes()
        ):
            return self.on_cuda(x, codes, scales, bias, out_features, exponent)
        return self._registered(x, codes, scales, bias, out_features, exponent)

    def prepare(self, weight: PackedTiles, dtype: torch.dtype) -> None:
        """Compile and load every kernel that may be chosen for this weight, whatever M: call it before a graph capture."""
        device = weight.codes.device
        choices = self._tables.possible(gpu_of(device), weight.out_features, weight.in_features)
        for choice in (*choices, CUBLAS) if weight.exponent > MOST_ROUNDED else choices:
            driver.loaded(self._kernel(choice, dtype, group_of(weight.codes, weight.scales), target_of(device)), device)
        torch.cuda.synchronize(device)  # the kernels fetch weights ahead of stream order: these must be complete

    def kernels(self, device: torch.device, dtype: torch.dtype, group: int) -> dict[str, Kernel]:
        """By choice, every kernel that may be chosen on a device, whatever the size of the weight and M; `group` as below."""
        choices = dict.fromkeys((*self._tables.named_on(gpu_of(device)), CUBLAS))
        return {choice: self._kernel(choice, dtype, group, target_of(device)) for choice in choices}

    def multiply_with(
        self, choice: str, x: Tensor, weight: PackedTiles, bias: Tensor | None = None, target: str | None = None
    ) -> Tensor:
        """The operation with a named tile or `cublas` instead of the dispatched choice, perhaps compiled for another target."""
        codes, scales, out_features = weight.codes, weight.scales, weight.out_features
        self.check(x, codes, scales, bias, out_features, weight.exponent)
        y = x.new_empty((x.shape[0], out_features))
        if choice == CUBLAS:
            self._through_cublas(y, x, codes, scales, bias)
        elif x.shape[0]:
            plan = self._plan_for(choice, x, codes, scales, out_features, target or target_of(x.device))
            plan(y, x, codes, scales, bias, weight.exponent)
        return y

    def dequantize(self, weight: PackedTiles, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] on its device, equal to `QuantizedLinear.dequantize`."""
        out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.codes.device)
        with torch.cuda.device(out.device):
            self._dequantize_rows(weight.codes, weight.scales, out)
        return out

    def forget_plans(self) -> None:
        """Choose anew: the dispatch tables changed."""
        driver.kept.launches.clear()

    def check(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, exponent: int) -> None:
        """Refuse, by name, what the kernels cannot read."""
        self._check_weight(codes, scales, out_features)
        k = codes.shape[1] * TILE_K
        if x.dtype not in ELEMENTS:
            raise TypeError(f"x must be float16 or bfloat16, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] != k:
            raise ValueError(f"x must be [M, {k}], got {list(x.shape)}")
        for name, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        for name, tensor in (("x", x), ("codes", codes), ("scales", scales), ("bias", bias)):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (out_features,)):
            raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")
        if not LEAST_EXPONENT <= exponent <= MOST_EXPONENT:
            raise ValueError(f"exponent must be from {LEAST_EXPONENT} to {MOST_EXPONENT}, got {exponent}")

    def _check_weight(self, codes: Tensor, scales: Tensor, out_features: int) -> None:
        if codes.dtype != torch.int32 or codes.ndim != 3 or codes.shape[2] != self._words:
            raise ValueError(f"codes must be int32 [N/64, K/128, {self._words}], got {codes.dtype} {list(codes.shape)}")
        tiles, k = codes.shape[0], codes.shape[1] * TILE_K
        rows = [1, *(k // group for group in self._groups)]
        if scales.dtype != torch.float16 or scales.shape not in {(tiles, count, TILE_N) for count in rows}:
            counts = " or ".join(map(str, rows))
            raise ValueError(f"scales must be float16 [{tiles}, {counts}, {TILE_N}], got {scales.dtype} {list(scales.shape)}")
        if not (tiles - 1) * TILE_N < out_features <= tiles * TILE_N:
            raise ValueError(f"out_features {out_features} does not fit {tiles} tiles of {TILE_N}")

    def on_cpu(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, exponent: int) -> Tensor:
        """The implementation for a CPU: the reference."""
        self.check(x, codes, scales, bias, out_features, exponent)
        return self._reference(x, codes, scales, bias, out_features)

    def on_cuda(
        self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, exponent: int
    ) -> Tensor:
        """The implementation for a GPU: a kernel, or cuBLAS."""
        y = x.new_empty((x.shape[0], out_features))
        self.write(y, x, codes, scales, bias, exponent)
        return y

    def write(self, y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, exponent: int) -> None:
        """The implementation for a GPU, into `y` [M, N]: contiguous, of the type and on the device of x."""
        out_features = y.shape[1]
        if x.shape[0] == 0:
            self.check(x, codes, scales, bias, out_features, exponent)
            return
        # Shapes, types and devices that were checked once are recognised by their plan; what is left is checked every time.
        devices = (x.get_device(), codes.get_device(), scales.get_device())
        wild = exponent > MOST_ROUNDED
        key = (self, x.shape, x.dtype, codes.shape, codes.dtype, scales.shape, scales.dtype, out_features, devices, wild)
        plan: LaunchPlan | None = driver.kept.launches.get(key)
        if plan is None or bias is not None or not (x.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()):
            self.check(x, codes, scales, bias, out_features, exponent)
        if plan is None:
            plan = self._make_plan(x, codes, scales, out_features, exponent)
            if plan is None:
                self._through_cublas(y, x, codes, scales, bias)
                return
            driver.keep(key, plan)
        plan(y, x, codes, scales, bias, exponent)

    def _make_plan(self, x: Tensor, codes: Tensor, scales: Tensor, out_features: int, exponent: int) -> LaunchPlan | None:
        """How to multiply, or None for cuBLAS."""
        require_trust(x.device.index)
        choice = self._tables.choose(gpu_of(x.device), x.shape[0], out_features, x.shape[1])
        if choice == CUBLAS or (exponent > MOST_ROUNDED and self._rounds_float16(choice, x.dtype, group_of(codes, scales))):
            return None
        return self._plan_for(choice, x, codes, scales, out_features, target_of(x.device))

    def _rounds_float16(self, choice: str, dtype: torch.dtype, group: int) -> bool:
        """Whether a tile's kernel applies scales to float16 weights."""
        return group > 0 and dtype == torch.float16 and self._tables.tiles[choice].for_group(group).rounded

    def _plan_for(self, choice: str, x: Tensor, codes: Tensor, scales: Tensor, out_features: int, target: str) -> LaunchPlan:
        function = driver.loaded(self._kernel(choice, x.dtype, group_of(codes, scales), target), x.device)
        tile = self._tables.tiles[choice].for_group(group_of(codes, scales))
        return self._plan(tile, function, x, codes, out_features)

    def _through_cublas(self, y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Dequantise some outputs' weights, multiply, next outputs: for many rows, where the tensor cores are the limit."""
        k, out_features = x.shape[1], y.shape[1]
        tiles_at_once = max(1, _CUBLAS_CHUNK_BYTES // (2 * k * TILE_N))
        chunks = -(-codes.shape[0] // tiles_at_once)
        tiles_at_once = -(-codes.shape[0] // chunks)
        weight = torch.empty((min(out_features, tiles_at_once * TILE_N), k), dtype=x.dtype, device=x.device)
        with torch.cuda.device(x.device):
            for tile in range(0, codes.shape[0], tiles_at_once):
                first, last = tile * TILE_N, min((tile + tiles_at_once) * TILE_N, out_features)
                rows = weight[: last - first]
                self._dequantize_rows(codes[tile : tile + tiles_at_once], scales[tile : tile + tiles_at_once], rows)
                if bias is None:
                    torch.mm(x, rows.T, out=y[:, first:last])
                else:
                    torch.addmm(bias[first:last], x, rows.T, out=y[:, first:last])

    def _dequantize_rows(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        tiles, groups, _ = codes.shape
        launch = driver.launch_of(
            self._kernel(CUBLAS, out.dtype, group_of(codes, scales), target_of(out.device)), out.device, tiles * groups
        )
        stream = driver.current_stream(out.device.index)
        launch(stream, codes.data_ptr(), scales.data_ptr(), out.data_ptr(), groups, scales.shape[1], out.shape[0])


def _fake(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, exponent: int) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], out_features))


def group_of(codes: Tensor, scales: Tensor) -> int:
    """Inputs that share a scale, 0 if all of K do: then it is applied once, at the end."""
    return 0 if scales.shape[1] == 1 else codes.shape[1] * TILE_K // scales.shape[1]
