"""Both operators on a CPU: the reference, what is refused, tracing."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops.linear import reference, sparse_reference, w4a16, w24a16
from marlin_tools.quantized import ZERO, QuantizedLinear


class Family(NamedTuple):
    """An operator, how its weights are packed, and its oracle."""

    module: ModuleType
    pack: Callable[[QuantizedLinear], Any]
    linear: Callable[..., torch.Tensor]
    overload: Any
    oracle: ModuleType


FAMILIES = {
    "dense": Family(w4a16, ops.pack, ops.linear, torch.ops.marlin_tools.w4a16_linear.default, reference),
    "sparse": Family(
        w24a16, ops.pack_sparse, ops.sparse_linear, torch.ops.marlin_tools.w24a16_linear.default, sparse_reference
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def make(family, n=72, k=256, group_size=128, dtype=torch.float16, m=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
    if family is FAMILIES["sparse"]:
        codes.scatter_(2, torch.rand(codes.shape, generator=generator).argsort(dim=2)[..., :2], ZERO)
    scales = (torch.randn((n, k // group_size), generator=generator) * 0.02).to(torch.float16)
    weight = QuantizedLinear(codes.view(n, k), scales, group_size)
    return weight, family.pack(weight), torch.randn((m, k), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, 256])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_reference_is_a_product_with_the_dequantized_weight(family, dtype, group_size, m):
    weight, packed, x = make(family, dtype=dtype, group_size=group_size, m=m)
    bias = torch.randn(72).to(dtype)

    y = family.linear(x, packed, bias)

    expected = x.to(torch.float64) @ weight.dequantize(torch.float64).T + bias.to(torch.float64)
    assert y.dtype == dtype
    assert y.shape == (m, 72)
    assert torch.equal(family.oracle.exact(x, packed, bias), expected)
    assert ((y - expected).abs() <= family.oracle.error_bound(x, packed, bias)).all()


@pytest.mark.parametrize("group_size", [32, 64])
def test_narrow_groups_of_dense_weights(group_size):
    dense, sparse = FAMILIES["dense"], FAMILIES["sparse"]
    weight, packed, x = make(dense, group_size=group_size)

    y = ops.linear(x, packed)

    expected = x.to(torch.float64) @ weight.dequantize(torch.float64).T
    assert packed.scales.shape == (2, 256 // group_size, 64)
    assert ((y - expected).abs() <= reference.error_bound(x, packed)).all()
    with pytest.raises(ValueError, match=f"group_size {group_size} is neither 128 nor"):
        make(sparse, group_size=group_size)
    torch.library.opcheck(dense.overload, (x, packed.codes, packed.scales, None, 72, packed.exponent))


def test_sparse_operator_refuses_scales_of_narrow_groups():
    _, packed, x = make(FAMILIES["sparse"])
    scales = packed.scales.repeat_interleave(2, dim=1)
    with pytest.raises(ValueError, match=r"scales must be float16 \[2, 1 or 2, 64\]"):
        w24a16.check(x, packed.codes, scales, None, 72, packed.exponent)


def test_bound_notices_one_wrong_weight():
    family = FAMILIES["dense"]
    weight, packed, x = make(family)
    codes = weight.codes.clone()
    codes[7, 100] = (codes[7, 100] + 1) % 16
    wrong = ops.linear(x, ops.pack(QuantizedLinear(codes, weight.scales, 128)))

    outside = (wrong - reference.exact(x, packed)).abs() > reference.error_bound(x, packed)

    assert outside[:, 7].all()
    assert outside.sum() == 3


def test_both_operators_give_the_same():
    weight, packed, x = make(FAMILIES["sparse"])
    assert torch.equal(ops.sparse_linear(x, packed), ops.linear(x, ops.pack(weight)))


REFUSED = {
    "x must be float16 or bfloat16": lambda a: a | {"x": a["x"].float()},
    r"x must be \[M, 256\]": lambda a: a | {"x": a["x"][:, :128].contiguous()},
    r"x must be \[M, 256\], got \[256\]": lambda a: a | {"x": a["x"][0]},
    "x must be contiguous": lambda a: a | {"x": a["x"].T.contiguous().T},
    "codes must be int32": lambda a: a | {"codes": a["codes"].float()},
    r"codes must be int32 \[N/64, K/128, \d+\]": lambda a: a | {"codes": torch.zeros((2, 2, 896), dtype=torch.int32)},
    "codes must be contiguous": lambda a: a | {"codes": a["codes"].transpose(0, 1).contiguous().transpose(0, 1)},
    "scales must be float16": lambda a: a | {"scales": a["scales"].bfloat16()},
    r"scales must be float16 \[2, 1 or 2.*, 64\]": lambda a: a | {"scales": a["scales"][:1]},
    "bias must be torch.float16": lambda a: a | {"bias": torch.zeros(72)},
    r"bias must be torch.float16 \[72\]": lambda a: a | {"bias": torch.zeros(64, dtype=torch.float16)},
    "scales is on meta": lambda a: a | {"scales": a["scales"].to("meta")},
    "out_features 129": lambda a: a | {"out_features": 129},
    "out_features 64": lambda a: a | {"out_features": 64},
    "exponent must be from -12 to 24, got 25": lambda a: a | {"exponent": 25},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(family, message):
    _, packed, x = make(family)
    arguments = {
        "x": x,
        "codes": packed.codes,
        "scales": packed.scales,
        "bias": None,
        "out_features": 72,
        "exponent": packed.exponent,
    }
    family.module.check(**arguments)

    with pytest.raises((ValueError, TypeError), match=message):
        family.module.check(**REFUSED[message](arguments))


def test_weights_of_the_other_operator_are_refused():
    weight, packed, x = make(FAMILIES["sparse"])
    with pytest.raises(ValueError, match=r"codes must be int32 \[N/64, K/128, 1024\]"):
        w4a16.check(x, packed.codes, packed.scales, None, 72, packed.exponent)
    dense = ops.pack(weight)
    with pytest.raises(ValueError, match=r"codes must be int32 \[N/64, K/128, 768\]"):
        w24a16.check(x, dense.codes, dense.scales, None, 72, dense.exponent)


def test_opcheck(family):
    _, packed, x = make(family)
    for bias in (None, torch.zeros(72, dtype=torch.float16)):
        torch.library.opcheck(family.overload, (x, packed.codes, packed.scales, bias, 72, packed.exponent))


def test_fake_knows_the_shape(family):
    _, packed, x = make(family)
    y = family.overload(x.to("meta"), packed.codes.to("meta"), packed.scales.to("meta"), None, 72, packed.exponent)
    assert y.shape == (3, 72)
    assert y.dtype == torch.float16


def test_compiles_whole(family):
    _, packed, x = make(family)
    compiled = torch.compile(lambda x: family.linear(x, packed) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), family.linear(x, packed) + 1)
