"""What happens between the kernels, without a GPU: with plain torch in the place of each, blocks and panels add up to the codes
of the walk along single columns."""

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, Gram, Hessian, polish, sweep
from marlin_tools.algorithms.polish import descend, refit
from marlin_tools.algorithms.scales import decode, encode
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver.kernels import BLOCK, Grid, PolishState


def problem(n: int, k: int) -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(0)
    gram = Gram(k, torch.device("cpu"))
    gram.add(torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator))
    return torch.randn(n, k, generator=generator) * 0.02, gram.hessian()


def sweep_block(
    weight_nk: Tensor, owed_nb: Tensor, feedback_bb: Tensor, grid: Grid, codes_nk: Tensor, errors_nk: Tensor, start: int
) -> None:
    """What `sweep.cu` says at its top."""
    target_nb = weight_nk[:, start : start + BLOCK] + owed_nb
    for i in range(target_nb.shape[1]):
        scale_n = grid.scales[:, int(grid.group_of[start + i])]
        code_n = encode(target_nb[:, i], scale_n)
        if grid.mask is not None:
            code_n = torch.where(grid.mask[:, start + i], code_n, 8)
        codes_nk[:, start + i] = code_n.to(torch.uint8)
        errors_nk[:, start + i] = weight_nk[:, start + i] - decode(code_n, scale_n)
        target_nb[:, i + 1 :] += errors_nk[:, start + i, None] * feedback_bb[i, i + 1 :]


def descend_block(state: PolishState, gradient_nb: Tensor, hessian_kk: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """What `descend.cu` says at its top."""
    stop, size = min(start + BLOCK, len(hessian_kk)), state.weight.shape[1] // state.scales.shape[1]
    before, gradient_nb = state.errors[:, start:stop].clone(), gradient_nb.clone()
    local = PolishState(state.weight, state.codes.float(), state.scales, state.errors, state.mask)
    for first in range(start, stop, size) if size <= BLOCK else ():
        columns, inside = slice(first, first + size), slice(first - start, first - start + size)
        old_n = state.scales[:, first // size].clone()
        new_n = refit(old_n, local.codes[:, columns], gradient_nb[:, inside], hessian_kk[columns, columns], dtype)
        moved_nb = (local.codes[:, columns] - 8) * (old_n - new_n)[:, None]
        state.scales[:, first // size] = new_n
        state.errors[:, columns] += moved_nb
        gradient_nb += moved_nb @ hessian_kk[columns, start:stop]
    descend(local, gradient_nb, hessian_kk[start:stop, start:stop], start)
    state.codes[:, start:stop] = local.codes[:, start:stop].to(torch.uint8)
    return state.errors[:, start:stop] - before


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "sweep_block", sweep_block)
    monkeypatch.setattr(solver, "descend_block", descend_block)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("masked", [False, True])
def test_sweep(masked: bool) -> None:
    weight, hessian = problem(48, 2 * sweep.WIDE + 192)
    order = hessian.energy_order()
    factor = hessian.factorize(0.01, "layer", order)
    group_of = (order // 64).to(torch.int32)
    scales = weight.view(48, -1, 64).abs().amax(dim=2) * (2 / 15)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None

    class Rule:
        looks = chooses = False
        grid: Grid | None = None
        codes = torch.empty(weight.shape)

        def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
            pass

        def quad(self, first: int, held_n4: Tensor) -> None:
            pass

        def column(self, j: int, target_n: Tensor) -> Tensor:
            scale_n = scales[:, int(group_of[j])]
            code_n = encode(target_n, scale_n)
            self.codes[:, j] = code_n if mask is None else torch.where(mask[:, j], code_n, 8)
            return decode(self.codes[:, j], scale_n)

    rule = Rule()
    sweep.sweep(weight[:, order], factor, rule)
    fused = sweep._fused_sweep(weight[:, order].contiguous(), factor, rule, Grid(scales, group_of, mask))
    assert float((fused != rule.codes).float().mean()) < 1e-3  # ties
    assert len(rule.codes.unique()) > 8


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, 384, 1152])
def test_polish(group_size: int, masked: bool) -> None:
    weight, hessian = problem(48, 1152)
    linear = GPTQ(polish=0, drift=0).solve("layer", weight, hessian, group_size, torch.float16).linear
    codes, scales, mask = linear.codes.float(), linear.scales.float(), None
    if masked:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        codes = torch.where(mask, codes, 8)
    plain_codes, plain_scales = polish.polish(weight, codes, scales, hessian.matrix, torch.float16, 2, mask)

    errors = weight - decode(codes, scales.repeat_interleave(group_size, dim=1))
    state = PolishState(weight, codes.to(torch.uint8), scales.clone(), errors, mask)
    polish._fused_rounds(state, hessian.matrix, torch.float16, 2)
    assert float((state.codes != plain_codes).float().mean()) < 5e-3  # ties, of codes and of scales
    assert not torch.equal(plain_codes, codes)
    values = [
        decode(c.float(), s.repeat_interleave(group_size, dim=1))
        for c, s in ((state.codes, state.scales), (plain_codes, plain_scales))
    ]
    losses = [float(polish.row_losses(weight, value, hessian.matrix).sum()) for value in values]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(state.errors, weight - values[0], rtol=0, atol=1e-6)
