"""The operation in plain torch: the oracle of the kernels, and what runs on a CPU."""

import torch
from torch import Tensor

from marlin_tools.ops.linear.layout import PackedWeight, unpack
from marlin_tools.quantized import ZERO, QuantizedLinear


def w4a16_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [M, K] times the packed weight, transposed, plus bias."""
    return linear(x, unpack(PackedWeight(codes, scales, out_features, 0)), bias)


def linear(x: Tensor, weight: QuantizedLinear, bias: Tensor | None) -> Tensor:
    """Compute x [M, K] times the weight, transposed, plus bias: float32 inside, one rounding at the end."""
    y = x.to(torch.float32) @ weight.dequantize(torch.float32).T
    if bias is not None:
        y += bias.to(torch.float32)
    return y.to(x.dtype)


def exact(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """The same in float64 without the last rounding; `rounded` if grouped weights are `rounded_weight` for the type of x."""
    y = x.to(torch.float64) @ _values(packed, x.dtype if rounded else None).T
    return y if bias is None else y + bias.to(torch.float64)


def error_bound(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """What `|y - exact|` may not exceed, per element: the rounding of the output plus float32 accumulation over K.

    Nothing is allowed for rounding weights: kernels that do so are compared with the product of exactly these weights. 2 ulp of
    the output, and K * 2^-24 of the sum of magnitudes: tensor cores truncate where float32 addition would round. The last term
    is the spacing of subnormals.
    """
    total = x.to(torch.float64).abs() @ _values(packed, x.dtype if rounded else None).abs().T
    if bias is not None:
        total = total + bias.to(torch.float64).abs()
    info = torch.finfo(x.dtype)
    y = exact(x, packed, bias, rounded=rounded)
    return info.eps * y.abs() + packed.in_features * 2.0**-24 * total + info.tiny * info.eps


def rounded_weight(weight: QuantizedLinear, dtype: torch.dtype, exponent: int) -> Tensor:
    """What kernels multiply with that apply scales to weights of 16 bits, in float64: products of code and scale, rounded once.

    In bfloat16 of a scale that is rounded to bfloat16. In float16 products are rounded when they are smaller by 2^exponent:
    that is no other rounding than that of `QuantizedLinear.dequantize`, but for subnormal numbers.
    """
    codes = weight.codes.to(torch.float64) - ZERO
    if dtype == torch.bfloat16:
        scales = weight.scales.to(dtype).to(torch.float64)
        return (codes * scales.repeat_interleave(weight.group_size, dim=1)).to(dtype).to(torch.float64)
    scales = (weight.scales.to(torch.float64) * ZERO * 2.0**-exponent).to(dtype).to(torch.float64)
    products = codes / ZERO * scales.repeat_interleave(weight.group_size, dim=1)
    return products.to(dtype).to(torch.float64) * 2.0**exponent


def _values(packed: PackedWeight, rounded_to: torch.dtype | None) -> Tensor:
    """The weight in float64. A scale per output is applied to sums by every kernel, so nothing is rounded then."""
    weight = unpack(packed)
    if rounded_to is not None and weight.scales.shape[1] > 1:
        return rounded_weight(weight, rounded_to, packed.exponent)
    return (weight.codes.to(torch.float64) - ZERO) * weight.scales.to(torch.float64).repeat_interleave(weight.group_size, dim=1)
