"""The sparse operator on a CPU: the reference, what is refused, tracing, and how work is dealt out."""

import json

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops import dispatch, sparse_dispatch, sparse_reference, w24a16
from marlin_tools.ops.dispatch import Measured
from marlin_tools.ops.sparse_layout import pack_sparse
from marlin_tools.ops.sparse_variants import SPARSE_TILES, sparse_kernels
from marlin_tools.ops.variants import TARGETS, capability_of
from marlin_tools.quantized import ZERO, QuantizedLinear
from marlin_tools.resources import kernels_dir


def make(n=72, k=256, group_size=128, dtype=torch.float16, m=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
    codes.scatter_(2, torch.rand(codes.shape, generator=generator).argsort(dim=2)[..., :2], ZERO)
    scales = (torch.randn((n, k // group_size), generator=generator) * 0.02).to(torch.float16)
    weight = QuantizedLinear(codes.view(n, k), scales, group_size)
    return weight, pack_sparse(weight), torch.randn((m, k), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, 256])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_reference_is_a_product_with_the_dequantised_weight(dtype, group_size, m):
    weight, packed, x = make(dtype=dtype, group_size=group_size, m=m)
    bias = torch.randn(72).to(dtype)

    y = ops.sparse_linear(x, packed, bias)

    expected = x.to(torch.float64) @ weight.dequantize(torch.float64).T + bias.to(torch.float64)
    assert y.dtype == dtype
    assert y.shape == (m, 72)
    assert torch.equal(sparse_reference.exact(x, packed, bias), expected)
    assert ((y - expected).abs() <= sparse_reference.error_bound(x, packed, bias)).all()


def test_same_as_the_dense_operator():
    weight, packed, x = make()
    assert torch.equal(ops.sparse_linear(x, packed), ops.linear(x, ops.pack(weight)))


REFUSED = {
    "x must be float16 or bfloat16": lambda a: a | {"x": a["x"].float()},
    r"x must be \[M, 256\]": lambda a: a | {"x": a["x"][:, :128].contiguous()},
    "x must be contiguous": lambda a: a | {"x": a["x"].T.contiguous().T},
    r"codes must be int32 \[N/64, K/128, 768\]": lambda a: a | {"codes": torch.zeros((2, 2, 1024), dtype=torch.int32)},
    "codes must be contiguous": lambda a: a | {"codes": a["codes"].transpose(0, 1).contiguous().transpose(0, 1)},
    r"scales must be float16 \[2, 2 or 1, 64\]": lambda a: a | {"scales": a["scales"][:1]},
    r"bias must be torch.float16 \[72\]": lambda a: a | {"bias": torch.zeros(64, dtype=torch.float16)},
    "scales is on meta": lambda a: a | {"scales": a["scales"].to("meta")},
    "out_features 129": lambda a: a | {"out_features": 129},
    "out_features 64": lambda a: a | {"out_features": 64},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message):
    _, packed, x = make()
    arguments = {"x": x, "codes": packed.codes, "scales": packed.scales, "bias": None, "out_features": 72}
    w24a16.check(**arguments)

    with pytest.raises((ValueError, TypeError), match=message):
        w24a16.check(**REFUSED[message](arguments))


def test_opcheck():
    _, packed, x = make()
    for bias in (None, torch.zeros(72, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.marlin_tools.w24a16_linear.default, (x, packed.codes, packed.scales, bias, 72))


def test_fake_knows_the_shape():
    _, packed, x = make()
    y = torch.ops.marlin_tools.w24a16_linear(x.to("meta"), packed.codes.to("meta"), packed.scales.to("meta"), None, 72)
    assert y.shape == (3, 72)
    assert y.dtype == torch.float16


# ---- which kernel, and how work is dealt to its blocks ----------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "sm_120"])
def test_every_shape_has_a_choice(target):
    for n, k in ((64, 128), (4096, 4096), (57344, 8192), (100, 28672)):
        for m in (1, 8, 9, 16, 17, 32, 64, 100, 256, 1000, 10**6):
            choice = sparse_dispatch.choose(target, m, n, k)
            assert choice in sparse_dispatch.possible(target, n, k)
            assert choice in sparse_dispatch.choices_on(target)


def test_shipped_table_is_sound():
    tables = json.loads((kernels_dir() / "dispatch-24.json").read_text())
    assert "sm_90a" in tables
    for target, rows in tables.items():
        measured = [Measured(row["n"], row["k"], tuple(row["rows"]), tuple(row["choices"])) for row in rows]
        sparse_dispatch.SPARSE.check(measured)
        assert {choice for row in measured for choice in row.choices} <= set(sparse_dispatch.choices_on(target))


def test_tables_of_dense_kernels_are_not_taken_for_theirs():
    with pytest.raises(ValueError, match="8x64-tma"):
        sparse_dispatch.SPARSE.check([Measured(64, 128, (1,), ("8x64-tma",))])
    assert sparse_dispatch.SPARSE.tuned_path() != dispatch.tuned_path()


def test_names_are_unique_and_say_the_shape():
    names = [variant.name for variant in sparse_kernels()]
    assert len(names) == len(set(names))
    for name, tile in SPARSE_TILES.items():
        assert name.partition("-")[0] == f"{tile.tokens}x{tile.outputs}"
        if tile.kernel == "warps":
            assert tile.along_n * tile.along_t * tile.along_k == 8


def test_hopper_kernels_are_for_hopper_alone():
    assert any(v.tile.endswith("-tma") for v in sparse_kernels("sm_90a"))
    for target in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"):
        assert not any(v.tile.endswith("-tma") for v in sparse_kernels(target))


@pytest.mark.parametrize("target", TARGETS)
def test_work_is_shared_out_completely(target):
    for tile in SPARSE_TILES.values():
        for tiles, groups in ((1, 1), (7, 3), (64, 32), (66, 32), (128, 64), (131, 8), (132, 8), (500, 32)):
            blocks, split, units = w24a16.partition(tile, tiles, groups, 132, capability_of(target))
            assert 1 <= blocks <= 132
            if split == 0:
                assert units == tiles * groups >= blocks
            else:
                assert units == tiles
                assert blocks % split == 0
                assert split == 1 or (blocks == tiles * split and groups >= tile.along_k * split <= groups)


def test_a_thread_keeps_so_many_plans_and_no_more(monkeypatch):
    monkeypatch.setattr(w24a16, "_MOST_PLANS", 2)
    plans = w24a16._ThreadPlans()
    for m in (1, 2, 3):
        plans.keep((m,), f"plan for {m}")
    assert plans.plans == {(2,): "plan for 2", (3,): "plan for 3"}
