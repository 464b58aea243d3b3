"""Bit-exact models of the two conversions in `kernels/common/element.cuh`, over every code in every nibble."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from marlin_tools.ops.linear.tiles import dequantizing_kernel
from marlin_tools.ops.runtime.compiler import compile_kernel
from marlin_tools.quantized import ZERO
from marlin_tools.resources import kernels_dir

SOURCE = (kernels_dir() / "common/element.cuh").read_text()


def constant(name, text=SOURCE):
    return int(re.search(rf"\b{name} = (0x[0-9A-F]+)", text)[1], 16)


def expression(name, text, **values):
    """The value of a constant that is made of others."""
    found = re.search(rf"\b{name} =\s+([^,;]+)[,;]", text)[1]
    return eval(found, {}, values)  # noqa: S307  our own source


def halves(word):
    return np.array([word & 0xFFFF, word >> 16], dtype=np.uint16)


def as_half(word):
    return halves(word).view(np.float16).astype(np.float64)


def as_bfloat16(word):
    return (halves(word).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def word_with(nibble, code):
    """The code in one nibble, something else in the seven others."""
    return 0x5AC3_96E1 & ~(15 << 4 * nibble) & 0xFFFFFFFF | code << 4 * nibble


@pytest.mark.parametrize("zero", [ZERO, 1, 7, 15])
@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("nibble", range(8))
def test_half_is_exact(nibble, code, zero):
    text = SOURCE[SOURCE.index("struct Half") : SOURCE.index("struct Bfloat16")]
    magic, factor = (constant(name, text) for name in ("kMagic", "kSixteenth"))
    bias, offset = (expression(name, text, kMagic=magic, kZero=zero) for name in ("kBias", "kMinusHigh"))
    q = word_with(nibble, code) >> (8 if nibble % 4 >= 2 else 0)
    if nibble % 2 == 0:
        planted = as_half(q & 0x000F000F | magic)
        exact = planted - as_half(bias)
    else:
        planted = as_half(q & 0x00F000F0 | magic)
        exact = planted * as_half(factor) + as_half(offset)

    rounded = exact.astype(np.float16)

    assert (rounded.astype(np.float64) == exact).all()  # so the instruction does not round either
    assert rounded[nibble // 4] == code - zero


@pytest.mark.parametrize("zero", [ZERO, 1, 7, 15])
@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("nibble", range(8))
def test_bfloat16_is_exact(nibble, code, zero):
    text = SOURCE[SOURCE.index("struct Bfloat16") :]
    factor = constant("kHigh" if nibble % 2 else "kLow", text)
    q = word_with(nibble, code) >> (8 if nibble % 4 >= 2 else 0)
    planted = as_bfloat16(q & (0x00F000F0 if nibble % 2 else 0x000F000F))

    exact = planted * as_bfloat16(factor) - zero / 64

    assert (torch.tensor(exact).to(torch.bfloat16).to(torch.float64).numpy() == exact).all()
    assert "kQuantum = 1.f / 64;" in text
    assert "kMinusZero = kNegative | pair_of<7>(kZero, -6);" in text
    assert exact[nibble // 4] * 64 == code - zero


def test_zero_points_as_floats_of_16_bits():
    """`pair_of`, which the compiler evaluates: twice n * 2^exponent."""
    pytest.importorskip("cuda.bindings.nvrtc")
    mirrors = []
    for bits, dtype in ((7, torch.bfloat16), (10, torch.float16)):
        for n in range(1, 16):
            for exponent in (-6, 0):
                word = torch.tensor(n * 2.0**exponent, dtype=dtype).view(torch.int16).item()
                mirrors.append((f"pair_of<{bits}>({n}, {exponent})", word * 0x10001))
    kernel = dequantizing_kernel("w4a16", torch.float16, "compute_80")
    compile_kernel(dataclasses.replace(kernel, mirrors=tuple(mirrors)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding_for_every_code_and_scale(dtype):
    """`dequantize_kernel` multiplies in float32, where code times scale is exact, and rounds once."""
    scales = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    codes = torch.arange(-8, 8)
    exact = codes.to(torch.float64)[:, None] * scales.to(torch.float64)
    in_float32 = codes.to(torch.float32)[:, None] * scales.to(torch.float32)

    finite = torch.isfinite(exact)
    assert torch.equal(in_float32.to(torch.float64)[finite], exact[finite])
    assert torch.equal(torch.isfinite(in_float32), finite)
    assert in_float32.to(dtype).shape == exact.shape
