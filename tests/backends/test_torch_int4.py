"""torch's INT4 product for CPUs: the same weights, exactly, and only where it is of use."""

import pytest
import torch

from marlin_tools.backends import load, torch_int4
from marlin_tools.backends.reference import PackedLinear
from marlin_tools.quantized import QuantizedLinear


def make(n=64, k=256, group_size=128):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand((n, k // group_size), generator=generator) * 0.02 + 0.01).bfloat16().half()
    return QuantizedLinear(codes, scales, group_size)


def build(weight, bias=None, dtype=torch.bfloat16):
    return torch_int4.build(weight, bias, torch.device("cpu"), dtype)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_is_the_product(group_size, rows):
    weight, bias, x = make(group_size=group_size), torch.randn(64).bfloat16(), torch.randn(2, rows, 256).bfloat16()
    linear = build(weight, bias)

    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert isinstance(linear, torch_int4.TorchInt4Linear)
    assert ((linear(x).double() - expected).norm() / expected.norm()).item() < 2**-7


def test_the_weight_comes_back_to_the_bit():
    weight = make()
    again = build(weight).weight()

    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert again.group_size == 128


INEXACT = QuantizedLinear(make().codes, make().scales * 1.0009765625, 128)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(make(), torch.float32), (make(), torch.float16), (make(n=72), torch.bfloat16), (INEXACT, torch.bfloat16)],
    ids=["float32", "float16", "outputs", "scales"],
)
def test_what_it_cannot_hold_stays_packed(weight, dtype):
    assert isinstance(build(weight, dtype=dtype), PackedLinear)


def test_a_model_runs_on_it(tiny_llama, write_int4):
    packed = write_int4(tiny_llama, "compressed-tensors")[0]
    model = load(packed, device="cpu", backend="torch-int4")

    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
