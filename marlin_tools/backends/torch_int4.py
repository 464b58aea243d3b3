"""torch's own INT4 product for CPUs: in bfloat16, where it beats dequantised weights. `docs/serving.md` has the figures.

In float32 and float16 torch's operator is many times slower than dequantised weights, so nothing here serves these.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marlin_tools.backends.reference import PackedLinear
from marlin_tools.quantized import ZERO, QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from marlin_tools.formats.stored import StoredLinears

_GROUPS = (32, 64, 128, 256)
_ROWS_AT_ONCE = 1024
_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001  (the only names that they have)
_multiply = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001


class TorchInt4Linear(nn.Module):
    """`nn.Linear` with a 4-bit weight in the layout that torch chose for this CPU."""

    words: Tensor
    scales_and_zeros: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        scales = weight.scales.t().to(torch.bfloat16)
        self.register_buffer("words", _pack(weight.codes.int(), 1))
        self.register_buffer("scales_and_zeros", torch.stack((scales, torch.zeros_like(scales)), dim=2).contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """One operator, whatever the leading dimensions."""
        y = self._multiply(x.reshape(-1, self.in_features), self.scales_and_zeros)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _multiply(self, rows: Tensor, scales_and_zeros: Tensor) -> Tensor:
        y: Tensor = _multiply(rows, self.words, self.group_size, scales_and_zeros)
        return y

    def weight(self) -> QuantizedLinear:
        """The weight in the neutral form. The layout is torch's secret, so codes are what it multiplies the identity with."""
        ones = torch.zeros_like(self.scales_and_zeros)
        ones[..., 0] = 1
        columns = torch.eye(self.in_features, dtype=torch.bfloat16).split(_ROWS_AT_ONCE)
        codes = torch.cat([self._multiply(rows, ones) for rows in columns]).t() + ZERO
        scales = self.scales_and_zeros[..., 0].t().to(torch.float16).contiguous()
        return QuantizedLinear(codes.to(torch.uint8).contiguous(), scales, self.group_size)

    def extra_repr(self) -> str:
        """As in `nn.Linear`, for `print(model)`."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, group_size={self.group_size}, bias={self.bias is not None}"


def obstacle(model: "PreTrainedModel", _linears: "StoredLinears", _device: torch.device) -> str | None:
    """Why it is no use for a model, or None."""
    return None if model.dtype == torch.bfloat16 else f"multiplies bfloat16 activations, not {model.dtype}"


def build(weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A linear on torch's operator, or on the packed reference if the operator cannot hold the weight exactly."""
    n, k = weight.shape
    fits = device.type == "cpu" and dtype == torch.bfloat16 and weight.group_size in _GROUPS and n % 16 == 0 and k > 0
    if fits and torch.equal(weight.scales.to(torch.bfloat16).to(torch.float16), weight.scales):
        return TorchInt4Linear(weight.to(device), bias)
    return PackedLinear(weight, bias, device, dtype)
