"""Quantised linears in plain torch: slow or large, runs anywhere, and what every other backend must agree with.

Both forms multiply with `QuantizedLinear.dequantize()` and nothing else; they differ in when they do it.

    at_load       once: a plain `nn.Linear` in the dtype of the activations, as large and as fast as the original model
    PackedLinear  at each call: the codes stay packed two per byte beside their scales, so the model takes the memory of INT4
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marlin_tools.quantized import QuantizedLinear, pack_nibbles, unpack_nibbles


def at_load(weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A plain linear that holds the dequantised weight."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(device).dequantize(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return linear


class KeepsScales(nn.Module):
    """Whose scales are what was stored, also where the rest of a model is made another type: `model.to(torch.bfloat16)`."""

    scales: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's own)
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not scales.is_meta:
            self.scales = scales.to(self.scales.device)
        return self


class PackedLinear(KeepsScales):
    """`nn.Linear` with a 4-bit weight: `pairs` uint8 [N*K/2] holds two codes per byte, the first in the low half."""

    pairs: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        self.dtype = dtype
        codes = weight.codes.flatten()
        if len(codes) % 2:
            codes = torch.cat((codes, codes.new_zeros(1)))
        self.register_buffer("pairs", pack_nibbles(codes, torch.uint8).to(device))
        self.register_buffer("scales", weight.scales.to(device))
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's own)
        self.dtype = fn(self.scales.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def weight(self) -> QuantizedLinear:
        """The weight in the neutral form."""
        codes = unpack_nibbles(self.pairs)
        shape = self.out_features, self.in_features
        return QuantizedLinear(codes[: shape[0] * shape[1]].view(shape), self.scales, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear` with the dequantised weight, to the bit."""
        return F.linear(x, self.weight().dequantize(self.dtype), self.bias)

    def extra_repr(self) -> str:
        """As in `nn.Linear`, for `print(model)`."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, group_size={self.group_size}, bias={self.bias is not None}"
