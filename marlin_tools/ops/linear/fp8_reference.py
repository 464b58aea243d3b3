"""Products with activations of 8 bits in plain torch: the oracle of `kernels/w4a8/`, and what runs on a CPU."""

import math

import torch
from torch import Tensor

from marlin_tools.ops.linear import reference
from marlin_tools.ops.linear.layout import TILE_K, PackedWeight, unpack

_LARGEST, _LEAST = 448.0, 2.0**-100  # of e4m3; of a token's largest value
_CHUNK = 16  # inputs that are permuted among themselves
_BITS_OF_SUMS = 13  # of tensor cores, below the largest product
_ADDITIONS = 128  # of products, before scales are applied
_STEP = 32  # inputs that tensor cores add at once
_LARGEST_HALF, _MOST_EXPONENT = 65504, 15  # of float16
_CODE = 8  # the largest distance of a code from zero


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


COLUMN_EXPONENT = 8
"""Of a weight with one scale per output for kernels with sums in float16, which scale these by one until the end."""


def smaller_scales(exponent: int, groups: int) -> int:
    """The power of two by which kernels with sums in float16 multiply scales, so that no sum overflows.

    Scales are at most 2^(exponent - 8), and the sum of a group at most 896 of its scale: 128 products of 448 and 8 / 512. Each
    addition may round up by 2^-11.
    """
    largest = groups * 896 * (1 + groups * 2.0**-11)
    return min(_MOST_EXPONENT, 8 - exponent - math.ceil(math.log2(max(1.0, largest / _LARGEST_HALF))))


def error_bound(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, half_sums: bool = True) -> Tensor:
    """What `|y - exact|` may not exceed, per element: `reference.error_bound`, and what sums of tensor cores lose.

    These add 32 products to the sum so far and keep 13 bits below the largest of all. So what is cut off of a product is less
    than 2^-13 of the sum before it; less than 2^-13 of the largest product, in up to 128 additions; and of the sum of
    magnitudes once more, though mostly less than 2^-15. With `half_sums` (Hopper) sums are rounded to float16 besides: that of
    each 128 inputs four times, in either direction; that of all before, wherever it began, once for each 128 inputs, to
    nearest. And small numbers have fewer bits.
    """
    rounded, token_scales = round_tokens(x)
    values = rounded.to(torch.float64) * token_scales.to(torch.float64)[:, None]
    weight = unpack(packed).dequantize(torch.float64)
    total = values.abs() @ weight.abs().T
    if bias is not None:
        total = total + bias.to(torch.float64).abs()
    largest = values.abs().amax(dim=1, keepdim=True) * weight.abs().amax(dim=1)
    before, after, largest_sum = _sums_on_the_way(values, weight)
    lost = 2.0**-_BITS_OF_SUMS * (total + _ADDITIONS * largest + _STEP * before)
    if half_sums:
        to_nearest = x.shape[1] // TILE_K * 2.0**-11 * 2 * largest_sum
        lost = lost + 2.0**-10 * after + to_nearest + _loss_of_small_halves(values, token_scales, packed)
    info = torch.finfo(x.dtype)
    return info.eps * exact(x, packed, bias).abs() + packed.in_features * 2.0**-24 * total + lost + info.tiny * info.eps


def _sums_on_the_way(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of the sums within each 128 inputs, before steps and after, added up; and the largest sum of all so far."""
    running = values.new_zeros((values.shape[0], weight.shape[0]))
    before = after = largest = running
    for tile in range(0, values.shape[1], TILE_K):
        part = torch.zeros_like(running)
        for first in range(tile, tile + TILE_K, _STEP):
            before = before + part.abs()
            part = part + values[:, first : first + _STEP] @ weight[:, first : first + _STEP].T
            after = after + part.abs()
        running = running + part
        largest = torch.maximum(largest, running.abs())
    return before, after, largest


def _loss_of_small_halves(values: Tensor, token_scales: Tensor, packed: PackedWeight) -> Tensor:
    """What float16 loses of sums, and of scales, that are too small for all bits."""
    groups = values.shape[1] // TILE_K
    column = packed.scales.shape[1] == 1
    growth = 2.0 ** -smaller_scales(COLUMN_EXPONENT if column else packed.exponent, groups)
    sums = 2.0**-24 * growth * 512 * groups * token_scales.to(torch.float64)[:, None]
    if column:
        return sums * unpack(packed).scales.to(torch.float64).abs().T
    return sums + 2.0**-24 * growth * _CODE * values.abs().sum(dim=1, keepdim=True)
