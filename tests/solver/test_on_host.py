"""The kernels' own text, run on a CPU, against plain torch: whole walks, with everything between the blocks."""

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import Hessian, Pruner, sweep
from marlin_tools.algorithms.masks import magnitude
from marlin_tools.algorithms.polish import row_losses
from marlin_tools.algorithms.pruning import TwoOfFour
from marlin_tools.algorithms.support import reselect
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.quantized import quads

MANY = 1 << 40  # tokens, which leave no doubt
N = 40  # more than one thread block, and not two whole ones
WIDTHS = (128, sweep.WIDE + 128 + 20)  # one block; and panels, blocks and a last block that is not whole


def problem(k: int) -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3 * k, k, generator=generator) @ (torch.randn(k, k, generator=generator) * torch.arange(1, k + 1) ** -0.5)
    return torch.randn(N, k, generator=generator) * 0.02, Hessian(x.T @ x / len(x), MANY)


def rows_of_equal_masks(one: Tensor, other: Tensor) -> Tensor:
    """A quad where two choices are as good as each other may turn, and pulls others along."""
    equal = (one == other).all(dim=1)
    assert int((~equal).sum()) <= 1
    assert bool((quads(other).sum(dim=2) == 2).all())
    return equal


@pytest.mark.parametrize("k", WIDTHS)
def test_choose(on_host: list[str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(k)
    fused = Pruner(fit=False, reselect=0).mask_solver("layer", hessian).place(weight)
    assert on_host == ["solver-choose"] * -(-k // 128)
    monkeypatch.setattr(solver, "runs_on", lambda tensor: False)
    rule = TwoOfFour(weight, hessian.factorize(0.01, "layer"))
    sweep.sweep(weight, hessian.factorize(0.01, "layer"), rule)

    rows = rows_of_equal_masks(rule.mask, fused.mask)
    torch.testing.assert_close(fused.value[rows], rule.values[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", WIDTHS)
def test_reselect(on_host: list[str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(k)
    mask, damped = magnitude(weight), hessian.damped(0.01)
    fused = reselect(weight, weight * mask, mask, damped)
    assert on_host == ["solver-reselect"] * -(-k // 128)
    monkeypatch.setattr(solver, "runs_on", lambda tensor: False)
    plain = reselect(weight, weight * mask, mask, damped)

    rows = rows_of_equal_masks(plain[1], fused[1])
    torch.testing.assert_close(fused[0][rows], plain[0][rows], rtol=1e-3, atol=1e-5)
    assert not bool(fused[0][~fused[1]].any())
    assert float((fused[1] != mask).float().mean()) > 0.05
    assert bool((row_losses(weight, fused[0], damped) < row_losses(weight, weight * mask, damped)).all())


def test_equal_scores_keep_the_earlier_columns(on_host: list[str]) -> None:
    weight = torch.tensor([[1.0, 1, 1, 1, 0, 2, 0, 2, 1, 3, 3, 3]])
    placed = Pruner(fit=False, reselect=0).mask_solver("layer", Hessian(torch.eye(12), 1)).place(weight)
    assert placed.mask.int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0]]
    assert torch.equal(placed.value, weight * placed.mask)
    assert on_host


@pytest.mark.usefixtures("on_host")
def test_whole_pruning_ends_where_torch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(256)
    fused = Pruner().prune("layer", weight, hessian)
    monkeypatch.setattr(solver, "runs_on", lambda tensor: False)
    plain = Pruner().prune("layer", weight, hessian)
    assert float(((fused.dense != 0) != (plain.dense != 0)).float().mean()) < 0.01
    assert float(fused.losses.output.sum()) == pytest.approx(
        float(plain.losses.output.sum()), rel=5e-3
    )  # rows may end in other minima
