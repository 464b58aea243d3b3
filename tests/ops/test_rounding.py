"""Weights that a kernel scales: the product of code and scale, rounded once, for every code and every scale that there is."""

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops import reference
from marlin_tools.quantized import QuantizedLinear


def all_scales():
    """Every finite float16 number."""
    scales = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return scales[scales.isfinite()]


def test_float16_multiplication_is_dequantize():
    codes, scales = torch.arange(16, dtype=torch.uint8), all_scales()
    weight = QuantizedLinear(codes.repeat(len(scales), 1), scales[:, None], 16)

    product = (codes.to(torch.float16) - 8) * scales[:, None]  # what `Half::scale` does

    assert torch.equal(product, weight.dequantize(torch.float16))


def test_bfloat16_in_two_parts_is_dequantize():
    codes, scales = torch.arange(16, dtype=torch.uint8), all_scales()
    weight = QuantizedLinear(codes.repeat(len(scales), 1), scales[:, None], 16)

    # What `Bfloat16::scale` does. A fused operation rounds the exact sum; float64 holds it.
    whole = scales.to(torch.float32)[:, None]
    first = (whole.view(torch.int32) & -65536).view(torch.float32)
    rest = whole - first
    small = (codes.to(torch.float32) - 8) * rest
    for part in (first, rest, small):
        assert torch.equal(part.to(torch.bfloat16).to(torch.float32), part)  # exact
    together = (codes.to(torch.float64) - 8) * first.to(torch.float64) + small.to(torch.float64)
    assert torch.equal(together.to(torch.float32).to(torch.float64), together)  # so one rounding is left

    assert torch.equal(together.to(torch.bfloat16), weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_grouped_weights_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8, generator=generator)
    x = torch.randn((3, 256), generator=generator).to(dtype)
    for group_size in (128, 256):
        scales = torch.rand((64, 256 // group_size), generator=generator).to(torch.float16)
        weight = QuantizedLinear(codes, scales, group_size)
        packed = ops.pack(weight)

        rounded = reference.exact(x, packed, rounded=True)

        used = weight.dequantize(dtype) if group_size == 128 else weight.dequantize(torch.float64)
        assert torch.equal(rounded, x.to(torch.float64) @ used.to(torch.float64).T)
        assert torch.equal(rounded, reference.exact(x, packed)) == (group_size == 256)
