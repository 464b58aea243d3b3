"""A transformers model whose quantised linears run on our kernels.

The model is built by transformers as always; then every linear that has codes and scales becomes a `NativeLinear`, or a
`NativeSparseLinear` if its codes are 2:4 sparse, whatever format they were stored in. Nothing else of the model changes, so
generation, static caches, CUDA graphs and `torch.compile` work as they do for the original.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marlin_tools import ops
from marlin_tools.backends.reference import KeepsScales
from marlin_tools.formats.contents import grid_of
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.ops.linear import w4a8, w4a16, w24a16
from marlin_tools.ops.linear.layout import TILE_N
from marlin_tools.quantized import QuantizedLinear, round_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NativeLinear(KeepsScales):
    """`nn.Linear` with a packed INT4 weight. Takes float16 or bfloat16 [..., K]; the weights stay in 4 bits."""

    codes: Tensor
    bias: Tensor | None

    def __init__(self, weight: ops.PackedWeight | ops.PackedSparse, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.exponent = weight.in_features, weight.out_features, weight.exponent
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> ops.PackedWeight | ops.PackedSparse:
        """What the kernels read."""
        return ops.PackedWeight(self.codes, self.scales, self.out_features, self.exponent)

    def forward(self, x: Tensor) -> Tensor:
        """One operator, whatever the leading dimensions."""
        return self._multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        return w4a16.OPERATOR(rows, self.codes, self.scales, self.bias, self.out_features, self.exponent)

    def extra_repr(self) -> str:
        """As in `nn.Linear`, for `print(model)`."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, group_size={self.weight.group_size}, bias={self.bias is not None}"


class NativeSparseLinear(NativeLinear):
    """The same with a 2:4-sparse weight: 3 bits each, and half of the arithmetic."""

    @property
    def weight(self) -> ops.PackedSparse:
        """What the sparse kernels read."""
        return ops.PackedSparse(self.codes, self.scales, self.out_features, self.exponent)

    def _multiply(self, rows: Tensor) -> Tensor:
        return w24a16.OPERATOR(rows, self.codes, self.scales, self.bias, self.out_features, self.exponent)


class NativeFp8Linear(NativeLinear):
    """The same on Hopper and Ada for FP8 activations: many tokens are rounded, each with its scale, and multiplied in 8 bits.

    Few tokens are multiplied as they are, so that nothing is lost (`w4a8.LEAST_ROWS`).
    """

    def _multiply(self, rows: Tensor) -> Tensor:
        operator = w4a8.operator_for(len(rows), self.exponent)
        return operator(rows, self.codes, self.scales, self.bias, self.out_features, self.exponent)


def obstacle(model: "PreTrainedModel", linears: StoredLinears, device: torch.device) -> str | None:
    """Why our kernels cannot run this model on this GPU, or None."""
    if model.dtype not in {torch.float16, torch.bfloat16}:
        return f"multiplies float16 or bfloat16 activations, not {model.dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"needs compute capability 8.0 (Ampere), {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    for name in linears.names:
        grid = grid_of(linears, name)
        if reason := ops.limits(grid.k, grid.group_size):
            return f"cannot hold `{name}`: {reason}"
    return None


def build(weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that multiplies with `weight` on a GPU, its kernels loaded; that they can is known by then (`obstacle`)."""
    weight = weight.to(device)
    bias = None if bias is None else bias.detach().to(device, dtype)
    if weight.is_2_4() and not ops.limits(weight.shape[1], weight.group_size, sparse=True):
        sparse = ops.pack_sparse(weight)
        if device.type == "cuda":
            ops.prepare_sparse(sparse, dtype)
        return NativeSparseLinear(sparse, bias)
    packed = ops.pack(weight)
    if device.type == "cuda":
        ops.prepare(packed, dtype)
    return NativeLinear(packed, bias)


def build_fp8(weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same for FP8 activations. Where no kernel multiplies in 8 bits, they are rounded, then multiplied in 16."""
    built = build(weight, bias, device, dtype)
    assert isinstance(built, NativeLinear)
    packed, k = built.weight, weight.shape[1]
    if device.type != "cuda" or isinstance(packed, ops.PackedSparse) or ops.fp8_supported(device, k, weight.group_size):
        return round_inputs(built)
    ops.prepare_fp8(packed, dtype)
    return NativeFp8Linear(packed, built.bias)


def join(linears: Sequence[NativeLinear]) -> NativeLinear | None:
    """One linear that computes the outputs of several side by side, or None if they are too different.

    The linears go on as views of its weights, so nothing is held twice.
    """
    tensors = [dict(linear.named_buffers()) for linear in linears]
    alike = {tuple((name, buffer.shape[1:], buffer.dtype) for name, buffer in each.items()) for each in tensors}
    outputs = [linear.out_features for linear in linears]
    if len({type(linear) for linear in linears}) > 1 or len(alike) > 1 or any(n % TILE_N for n in outputs):
        return None
    whole = copy.deepcopy(linears[0]).to("meta")
    whole.out_features, whole.exponent = sum(outputs), max(linear.exponent for linear in linears)
    for name in tensors[0]:
        joined = torch.cat([each[name] for each in tensors])
        setattr(whole, name, joined)
        for linear, piece in zip(linears, joined.split([len(each[name]) for each in tensors]), strict=True):
            setattr(linear, name, piece)
    return whole
