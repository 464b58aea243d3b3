"""Scales are numbers that both float16 and the type of the model hold, and the best of the candidates."""

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, Hessian
from marlin_tools.algorithms.scales import absmax, conditional, diagonal, storable


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-7, 0.0123, -0.5, 900.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storable_is_exact_in_both_types(value: float, dtype: torch.dtype) -> None:
    scale = storable(torch.tensor([value]), dtype)

    assert scale.item() != 0
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert math.copysign(1, scale.item()) == math.copysign(1, value)


def test_every_number_of_bfloat16_is_stored_as_one_that_both_types_hold() -> None:
    """Also where float16 is the coarser one; what they both hold stays."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 65504)]
    scales = storable(numbers, torch.bfloat16)

    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    both = (numbers.half().float() == numbers) & (numbers != 0)
    assert torch.equal(scales[both], numbers[both])
    assert int(both.sum()) > 7000


def least(weight: Tensor, scales: Iterable[float], weigh: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The oracle, one candidate after the other: |error · weigh|² of the best of these scales, and that scale."""
    costs = []
    for number in scales:
        scale = float(storable(torch.tensor([number]), dtype))
        levels = [scale * code for code in range(-8, 8)]
        errors = torch.tensor([min((level - w for level in levels), key=abs) for w in weight.tolist()], dtype=torch.float64)
        costs.append((float((errors @ weigh.double()).square().sum()), scale))
    return min(costs)


def groups(n: int) -> Tensor:
    """Ordinary ones, ones of one sign, and ones with a weight far outside."""
    weight = torch.randn(n, 16, generator=torch.Generator().manual_seed(5)) * 0.02
    weight[1::4] = weight[1::4].abs()
    weight[2::4, 3] *= 12
    weight[3::4, 3] = 1.0
    return weight


def test_a_conditional_scale_is_the_best_of_its_76_candidates() -> None:
    weight = groups(24)
    factor = torch.eye(16) + 0.3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(6)).triu(1)
    factor[3] *= 0.01  # clipping the weight that lies outside costs little: the smallest candidates count
    found = conditional(weight, factor, torch.float16).tolist()
    shares = []
    for row, scale in zip(weight, found, strict=True):
        widest = 2 / 15 * float(row.abs().max())
        cost, _ = least(row, [widest * (100 - step) / 100 for step in range(76)], factor, torch.float16)
        assert least(row, [scale], factor, torch.float16)[0] == pytest.approx(cost, rel=1e-3)
        shares.append(scale / widest)
    assert 0.25 == pytest.approx(min(shares), rel=1e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_a_diagonal_scale_is_the_best_of_both_rounds(*, signed: bool) -> None:
    """31 ratios from 1.1 to 0.5 of the largest weight over 8, in both signs, then nine around the best one."""
    weight, energy = groups(32), torch.rand(2, 16, generator=torch.Generator().manual_seed(7)) + 0.1
    energy[:, 3] = 1e-4
    found = diagonal(weight.view(16, 2, 16), energy, torch.float16, signed=signed).flatten()
    for number, (row, scale) in enumerate(zip(weight, found.tolist(), strict=True)):
        weigh, widest = energy[number % 2].sqrt().diag(), float(row.abs().max()) / 8
        signs = (1, -1) if signed else (1,)
        coarse = [sign * widest * (1.1 - 0.02 * step) for step in range(31) for sign in signs]
        _, best = least(row, coarse, weigh, torch.float16)
        near = min(coarse, key=lambda each: abs(each - best))
        fine = [near + math.copysign(widest, near) * 0.0045 * step for step in range(-4, 5)]
        cost, _ = least(row, fine, weigh, torch.float16)
        assert least(row, [scale], weigh, torch.float16)[0] == pytest.approx(cost, rel=1e-3)
    assert signed == bool((found < 0).any())


@pytest.fixture
def hessian() -> Hessian:
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(8))
    return Hessian(x.T @ x / len(x), 1 << 20)


@pytest.mark.parametrize(
    ("settings", "group_size"), [(GPTQ(scales="absmax", polish=0, drift=0), 64), (PRESETS["marlin"], 256)], ids=["64", "column"]
)
def test_scales_that_are_not_searched_hold_the_largest_weight(settings: GPTQ, group_size: int, hessian: Hessian) -> None:
    """That of `absmax`, and of `conditional` with one scale per column."""
    weight = groups(16 * 4).view(4, 256)
    found = settings.solve("layer", weight, hessian, group_size, torch.float16).linear.scales
    assert torch.equal(found.float(), absmax(weight.view(4, -1, group_size), torch.float16))


def test_a_scale_that_is_searched_as_the_sweep_goes_does_not_see_what_will_be_zero(hessian: Hessian) -> None:
    weight, factor = groups(8 * 4).view(4, 128), torch.eye(128)
    mask = torch.tensor([True, True, False, False]).repeat(4, 64)
    rule = PRESETS["marlin"].problem("layer", hessian, 128, torch.float16)._rule(torch.zeros(4, 256), mask)  # type: ignore[union-attr]
    rule.enter(0, weight, factor)
    assert torch.equal(rule.scales[:, 0], conditional(weight * mask[:, :128], factor, torch.float16))
    assert not torch.equal(rule.scales[:, 0], conditional(weight, factor, torch.float16))
