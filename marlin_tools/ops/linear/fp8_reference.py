"""Products with activations of 8 bits in plain torch: the oracle of `kernels/w4a8/`, and what runs on a CPU."""

import torch
from torch import Tensor

from marlin_tools.ops.linear import reference
from marlin_tools.ops.linear.layout import PackedWeight, unpack

_LARGEST, _LEAST = 448.0, 2.0**-100  # of e4m3; of a token's largest value
_CHUNK = 16  # inputs that are permuted among themselves
_BITS_OF_SUMS = 13  # of tensor cores, below the largest product
_ADDITIONS = 128  # of products, before scales are applied


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round [M, K] to float8_e4m3fn, with a float32 scale for each token that makes its largest value 448.

    A token with a value that is not finite gets a scale that is not a number, and so do all its outputs.
    """
    values = x.to(torch.float32)
    largest = values.abs().amax(dim=1, keepdim=True) if x.shape[1] else values.new_zeros((x.shape[0], 1))
    bound = torch.where(largest.isfinite(), largest.clamp(min=_LEAST), torch.nan)
    top = torch.full_like(bound, _LARGEST)  # tensors are divided as the kernel does it, numbers on a GPU by their reciprocals
    rounded = (values * (top / bound)).nan_to_num(0.0).to(torch.float8_e4m3fn)
    return rounded, (bound / top)[:, 0]


def in_kernel_order(rounded: Tensor) -> Tensor:
    """Inputs as the kernels multiply them: of 16, input 8 c + i is number 2 i + c."""
    return rounded.view(rounded.shape[0], -1, 2, _CHUNK // 2).transpose(2, 3).reshape(rounded.shape)


def w4a8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [M, K], rounded, times the packed weight, transposed, plus bias."""
    rounded, token_scales = round_tokens(x)
    weight = unpack(PackedWeight(codes, scales, out_features, 0)).dequantize(torch.float32)
    y = (rounded.to(torch.float32) @ weight.T) * token_scales[:, None]
    if bias is not None:
        y += bias.to(torch.float32)
    return y.to(x.dtype)


def exact(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The same in float64 without the last rounding."""
    rounded, token_scales = round_tokens(x)
    return reference.exact(rounded.to(torch.float64) * token_scales.to(torch.float64)[:, None], packed, bias)


def error_bound(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What `|y - exact|` may not exceed, per element: `reference.error_bound`, and for the short sums of tensor cores 2^-13 of
    the sum of magnitudes, of which mostly less than 2^-15 is lost. A sum that holds the product of an outlier loses the bits of
    other products below 2^-13 of that one, in up to 128 additions: no more than 2^-6 of the largest product.
    """
    rounded, token_scales = round_tokens(x)
    values = (rounded.to(torch.float64) * token_scales.to(torch.float64)[:, None]).abs()
    weight = unpack(packed).dequantize(torch.float64).abs()
    total = values @ weight.T
    if bias is not None:
        total = total + bias.to(torch.float64).abs()
    largest = values.amax(dim=1, keepdim=True) * weight.amax(dim=1)
    cut = 2.0**-_BITS_OF_SUMS * (total + _ADDITIONS * largest)
    info = torch.finfo(x.dtype)
    return info.eps * exact(x, packed, bias).abs() + packed.in_features * 2.0**-24 * total + cut + info.tiny * info.eps
