"""The self-test judges kernels of all families; here the reference takes their place, right or slightly wrong."""

import dataclasses

import pytest
import torch

from marlin_tools import ops
from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import selftest
from marlin_tools.ops.linear.dispatch import DENSE
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES

LINEAR = {"": ops.linear, "2:4 ": ops.sparse_linear, "fp8 ": ops.fp8_linear}


@pytest.fixture(params=selftest._FAMILIES, ids=lambda family: family.mark.strip() or "dense")
def family(request):
    return request.param


def check(family, multiply, choice="8x64", dtype=torch.float16):
    packed = family.pack(selftest._weight(128, torch.device("cpu")))
    return selftest._check("name", dataclasses.replace(family, multiply_with=multiply), choice, packed, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right_results_pass(family, dtype):
    result = check(family, lambda _choice, x, packed: LINEAR[family.mark](x, packed), dtype=dtype)
    assert result.passed
    assert "of the bound" in result.detail


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_wrong_results_do_not(family, wrong):
    def multiply(_choice, x, packed):
        y = LINEAR[family.mark](x, packed)
        y[-1, -1] *= wrong * (1.02 if family.mark == "fp8 " else 1)  # float16 sums may be a little more wrong
        return y

    assert not check(family, multiply).passed


def test_what_cannot_run_is_a_result(family):
    def multiply(*_):
        raise DeviceError("refused")

    assert check(family, multiply) == selftest.CheckResult("name", passed=False, detail="refused")


def test_names_tell_the_families_apart():
    assert {family.mark for family in selftest._FAMILIES} == set(LINEAR)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a"])
def test_every_kernel_of_a_gpu_is_tried(monkeypatch, target):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selftest, "target_of", lambda _device: target)
    monkeypatch.setattr(selftest, "_weight", lambda group, _device: f"group {group}")
    families = [dataclasses.replace(family, pack=lambda weight: weight) for family in selftest._FAMILIES]
    monkeypatch.setattr(selftest, "_FAMILIES", families)
    monkeypatch.setattr(selftest, "_check", lambda name, _family, choice, *_: tried.append((name.split()[0], choice)) or name)

    assert len(selftest.self_test()) == len(tried)
    in_8_bits = {choice for mark, choice in tried if mark == "fp8"}
    expected = {"sm_80": set(), "sm_89": {"64x256-ada", "128x128-ada"}, "sm_90a": set(FP8_TILES)}
    assert in_8_bits == expected[target]
    assert {choice for _, choice in tried} > set(DENSE.choices_on(target)) - {"cublas"}
