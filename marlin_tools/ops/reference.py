"""The operation in plain torch: the oracle of the kernels, and what runs on a CPU."""

import torch
from torch import Tensor

from marlin_tools.ops.layout import PackedWeight, unpack
from marlin_tools.quantized import QuantizedLinear


def w4a16_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [M, K] times the packed weight, transposed, plus bias."""
    return linear(x, unpack(PackedWeight(codes, scales, out_features)), bias)


def linear(x: Tensor, weight: QuantizedLinear, bias: Tensor | None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias: float32 inside, one rounding at the end."""
    y = x.to(torch.float32) @ weight.dequantize(torch.float32).T
    if bias is not None:
        y += bias.to(torch.float32)
    return y.to(x.dtype)


def exact(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The same in float64 without the last rounding."""
    weight = unpack(packed)
    values = (weight.codes.to(torch.float64) - 8) * weight.scales.to(torch.float64).repeat_interleave(weight.group_size, dim=1)
    y = x.to(torch.float64) @ values.T
    return y if bias is None else y + bias.to(torch.float64)


def error_bound(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What `|y - exact|` may not exceed, per element: the rounding of the output plus float32 accumulation over K.

    The kernels see exact weights, so nothing is allowed for rounding these. 2 ulp of the output, and K * 2^-24 of the sum of
    magnitudes: tensor cores truncate where float32 addition would round. The last term is the spacing of subnormals.
    """
    weight = unpack(packed)
    magnitude = (weight.codes.to(torch.float64) - 8).abs()
    magnitude *= weight.scales.to(torch.float64).abs().repeat_interleave(weight.group_size, dim=1)
    total = x.to(torch.float64).abs() @ magnitude.T
    if bias is not None:
        total = total + bias.to(torch.float64).abs()
    info = torch.finfo(x.dtype)
    return info.eps * exact(x, packed, bias).abs() + packed.in_features * 2.0**-24 * total + info.tiny * info.eps
