"""Weights that a kernel scales: the product of code and scale, rounded once, for every code and every scale that there is.

What `Half` and `Bfloat16` do in kernels/common/element.cuh, bit for bit in torch. A fused operation rounds the exact result,
which float64 holds.
"""

import re

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops.linear import reference
from marlin_tools.ops.linear.hopper import powers
from marlin_tools.ops.linear.layout import exponent_of
from marlin_tools.quantized import ZERO, QuantizedLinear
from marlin_tools.resources import kernels_dir


def constants(struct, name, dtype):
    """The two 16-bit numbers of a constant of this struct, low first."""
    source = (kernels_dir() / "common/element.cuh").read_text()
    word = int(re.search(rf"\b{name} = 0x([0-9A-F]{{8}})", source[source.index(f"struct {struct} ") :])[1], 16)
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float64).tolist()


def minus_zero_in_bfloat16():
    """The offset of `Bfloat16` per scale: minus the zero point, times a power of two that stands in the source."""
    source = (kernels_dir() / "common/element.cuh").read_text()
    return -ZERO * 2.0 ** int(re.search(r"kOffset = kNegative \| pair_of<7>\(kZero, (-\d+)\)", source)[1])


def all_scales():
    """Every finite float16 number."""
    scales = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return scales[scales.isfinite()]


def every_product(scales):
    """All codes times these scales: a row each."""
    return QuantizedLinear(torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1), scales[:, None], 16)


def planted(row, dtype):
    """The sixteen codes alone in the bits where the kernel leaves those of a fragment's first or second row."""
    return (torch.arange(16, dtype=torch.int32) << 4 * row).to(torch.int16).view(dtype).to(torch.float64)


def once(exact, dtype):
    """A rounded operation, in the type and back."""
    assert torch.equal(exact.to(torch.float32).to(torch.float64), exact)
    return exact.to(dtype).to(torch.float64)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("largest", [2.0**-24, 6e-5, 0.004, 0.0312, 0.5, 65504.0])
def test_float16_weights(row, largest):
    scales = all_scales()
    scales = scales[scales.abs() <= largest]
    exponent = exponent_of(scales)
    (per_scale, growth), dtype = powers(exponent), torch.float16
    minus_zero = torch.tensor([per_scale & 0xFFFF], dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float64)
    exact = scales.to(torch.float64)[:, None]

    offset = once(exact * minus_zero, dtype)
    factor = once(offset * constants("Half", "kPlanted", dtype)[row], dtype)
    factor = once(factor * constants("Half", "kRest", dtype)[row], dtype)
    weights = once(planted(row, dtype) * factor + offset, dtype)

    assert factor.isfinite().all()
    weight = every_product(scales)
    assert torch.equal(weights * growth, reference.rounded_weight(weight, dtype, exponent))
    # The same as everybody's float16 weights, except where these or the smaller ones are subnormal, or too large for float16.
    usual = weight.dequantize(dtype).to(torch.float64)
    differs = weights * growth != usual
    assert (usual[differs].abs() < 2.0 ** (max(exponent, 0) - 14)).logical_or(usual[differs].isinf()).all()
    true = (weight.codes.to(torch.float64) - 8) * exact
    assert ((weights * growth - true).abs() <= true.abs() * 2**-11 + 2.0 ** (exponent - 24)).all()


@pytest.mark.parametrize("row", [0, 1])
def test_bfloat16_weights(row):
    scales, dtype = all_scales(), torch.bfloat16
    rounded = once(scales.to(torch.float64)[:, None], dtype)

    offset = once(rounded * minus_zero_in_bfloat16(), dtype)
    factor = once(rounded * constants("Bfloat16", "kPlanted", dtype)[row], dtype)
    weights = once(planted(row, dtype) * factor + offset, dtype)

    assert factor.isfinite().all()
    expected = reference.rounded_weight(every_product(scales), dtype, 0)
    assert torch.equal(weights * 2.0**22, expected)
    as_in_a_bfloat16_checkpoint = every_product(scales).dequantize(torch.float32)  # of scales that are exact in it
    exact = scales.to(dtype).to(torch.float32) == scales.to(torch.float32)
    assert torch.equal(expected[exact], as_in_a_bfloat16_checkpoint[exact].to(dtype).to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_grouped_weights_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8, generator=generator)
    x = torch.randn((3, 256), generator=generator).to(dtype)
    for group_size in (32, 64, 128, 256):
        scales = torch.rand((64, 256 // group_size), generator=generator).to(torch.float16)
        weight = QuantizedLinear(codes, scales, group_size)
        packed = ops.pack(weight)

        rounded = reference.exact(x, packed, rounded=True)

        grouped = reference.rounded_weight(weight, dtype, packed.exponent)
        used = grouped if group_size < 256 else weight.dequantize(torch.float64)
        assert torch.equal(rounded, x.to(torch.float64) @ used.T)
        assert torch.equal(rounded, reference.exact(x, packed)) == (group_size == 256)
