"""The operator on a CPU: the reference, what is refused, tracing."""

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops import reference, w4a16
from marlin_tools.quantized import QuantizedLinear


def make(n=72, k=256, group_size=128, dtype=torch.float16, m=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.randn((n, k // group_size), generator=generator) * 0.02).to(torch.float16)
    weight = QuantizedLinear(codes, scales, group_size)
    return weight, ops.pack(weight), torch.randn((m, k), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, 256])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_reference_is_a_product_with_the_dequantised_weight(dtype, group_size, m):
    weight, packed, x = make(dtype=dtype, group_size=group_size, m=m)
    bias = torch.randn(72).to(dtype)

    y = ops.linear(x, packed, bias)

    expected = x.to(torch.float64) @ weight.dequantize(torch.float64).T + bias.to(torch.float64)
    assert y.dtype == dtype
    assert y.shape == (m, 72)
    assert torch.equal(reference.exact(x, packed, bias), expected)
    assert ((y - expected).abs() <= reference.error_bound(x, packed, bias)).all()


def test_bound_notices_one_wrong_weight():
    weight, packed, x = make()
    codes = weight.codes.clone()
    codes[7, 100] = (codes[7, 100] + 1) % 16
    wrong = ops.linear(x, ops.pack(QuantizedLinear(codes, weight.scales, 128)))

    outside = (wrong - reference.exact(x, packed)).abs() > reference.error_bound(x, packed)

    assert outside[:, 7].all()
    assert outside.sum() == 3


REFUSED = {
    "x must be float16 or bfloat16": lambda a: a | {"x": a["x"].float()},
    r"x must be \[M, 256\]": lambda a: a | {"x": a["x"][:, :128].contiguous()},
    r"x must be \[M, 256\], got \[256\]": lambda a: a | {"x": a["x"][0]},
    "x must be contiguous": lambda a: a | {"x": a["x"].T.contiguous().T},
    "codes must be int32": lambda a: a | {"codes": a["codes"].float()},
    "codes must be contiguous": lambda a: a | {"codes": a["codes"].transpose(0, 1).contiguous().transpose(0, 1)},
    "scales must be float16": lambda a: a | {"scales": a["scales"].bfloat16()},
    r"scales must be float16 \[2, 2 or 1, 64\]": lambda a: a | {"scales": a["scales"][:1]},
    "bias must be torch.float16": lambda a: a | {"bias": torch.zeros(72)},
    r"bias must be torch.float16 \[72\]": lambda a: a | {"bias": torch.zeros(64, dtype=torch.float16)},
    "scales is on meta": lambda a: a | {"scales": a["scales"].to("meta")},
    "out_features 129": lambda a: a | {"out_features": 129},
    "out_features 64": lambda a: a | {"out_features": 64},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message):
    _, packed, x = make()
    arguments = {"x": x, "codes": packed.codes, "scales": packed.scales, "bias": None, "out_features": 72}
    w4a16.check(**arguments)

    with pytest.raises((ValueError, TypeError), match=message):
        w4a16.check(**REFUSED[message](arguments))


def test_opcheck():
    _, packed, x = make()
    for bias in (None, torch.zeros(72, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.marlin_tools.w4a16_linear.default, (x, packed.codes, packed.scales, bias, 72))


def test_fake_knows_the_shape():
    _, packed, x = make()
    y = torch.ops.marlin_tools.w4a16_linear(x.to("meta"), packed.codes.to("meta"), packed.scales.to("meta"), None, 72)
    assert y.shape == (3, 72)
    assert y.dtype == torch.float16


def test_a_thread_keeps_a_bounded_number_of_plans(monkeypatch):
    """Prompts come in many lengths, and each has a plan of its own."""
    monkeypatch.setattr(w4a16, "_MOST_PLANS", 3)
    plans = w4a16._ThreadPlans()
    for rows in range(5):
        plans.keep((rows,), rows)

    assert plans.plans == {(2,): 2, (3,): 3, (4,): 4}
