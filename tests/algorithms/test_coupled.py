"""Rows that make up for each other: what an error costs by G and H together falls, and nothing else changes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRUNERS, Hessian
from marlin_tools.algorithms.coupled import Coupled, Worth
from marlin_tools.algorithms.hessian import Drift

N, K = 48, 128
MANY = 1 << 40  # tokens, which leave no doubt


def correlated(size: int, seed: int) -> Hessian:
    """A Gram matrix with a steep spectrum, in no order."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1) ** -0.7
    x = torch.randn(4096, size, generator=generator) @ mix.T
    return Hessian(x.T @ x / len(x), MANY)


@dataclass(frozen=True)
class Case:
    """A weight, what it reads, and what its outputs are worth."""

    weight: Tensor
    hessian: Hessian
    gram: Hessian

    def cost(self, value: Tensor) -> float:
        """tr(G E H Eᵀ)."""
        error = (value - self.weight).double()
        return float((self.gram.matrix.double() @ error @ self.hessian.matrix.double() * error).sum())

    def own_cost(self, value: Tensor) -> float:
        """The same of each row by itself."""
        return replace(self, gram=Hessian(torch.eye(N), MANY)).cost(value)


@pytest.fixture
def case() -> Case:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(2)) * 0.02
    return Case(weight, correlated(K, 0), correlated(N, 1))


@pytest.fixture
def solved(case: Case) -> Callable[..., Tensor]:
    """`solved(gram, sparse=True)` with these worths (None: no row is told of another), dense or 2:4."""

    def call(gram: Hessian | None = None, *, sparse: bool = False, hessian: Hessian = case.hessian) -> Tensor:
        mask_solver = PRUNERS["default"].mask_solver("w", hessian) if sparse else None
        problem = GPTQ().problem("w", hessian, 128, torch.float16, mask_solver)
        if gram is None:
            return problem.solve(case.weight, slice(0, N)).value(torch.float32)
        coupled = Coupled(problem, [(slice(0, N), Worth.of("w", gram))])
        return coupled.solve(case.weight, slice(0, N)).value(torch.float32)

    return call


@pytest.mark.parametrize("sparse", [False, True])
def test_an_error_costs_less(case: Case, solved: Callable[..., Tensor], *, sparse: bool) -> None:
    alone, together = solved(sparse=sparse), solved(case.gram, sparse=sparse)

    assert case.cost(together) < 0.75 * case.cost(alone)
    assert case.own_cost(together) > case.own_cost(alone)  # each row by itself is worse: it pays for the others
    if sparse:
        assert bool(((together.view(N, -1, 4) != 0).sum(dim=2) <= 2).all())


def test_the_dearest_are_solved_first(case: Case, solved: Callable[..., Tensor]) -> None:
    together, alone = solved(case.gram), solved()
    dearest, others = case.gram.energy_order().split([N // 16, N - N // 16])

    assert torch.equal(together[dearest], alone[dearest])  # nobody was before them
    assert not torch.equal(together[others], alone[others])


def test_rows_of_one_worth_that_know_nothing_of_each_other_are_solved_alone(solved: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(solved(Hessian(torch.eye(N), MANY)), solved(), rtol=0, atol=0)


def test_parts_aim_at_what_makes_up_for_those_before(case: Case, solved: Callable[..., Tensor]) -> None:
    """The target of the last part by the book: -G_pp⁻¹ G_pd E_d, in float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    problem = GPTQ().problem("w", case.hessian, 128, torch.float16)
    solve = type(problem).solve

    class Watched(type(problem)):  # type: ignore[misc]
        def solve(self, weight: Tensor, rows: Tensor, aim: Tensor) -> object:
            seen.append((rows, aim))
            return solve(self, weight, rows, aim)

    watched = Watched(**{name: getattr(problem, name) for name in problem.__dataclass_fields__})
    worth = Worth.of("w", case.gram)
    value = Coupled(watched, [(slice(0, N), worth)]).solve(case.weight, slice(0, N)).value(torch.float32)
    error = (value - case.weight).double()
    matrix = case.gram.unsure(1.0).damped(worth.factor.damp).double()
    for number, (rows, aim) in enumerate(seen):
        done = torch.cat([before for before, _ in seen[:number]]) if number else torch.empty(0, dtype=torch.long)
        left = torch.cat([after for after, _ in seen[number:]])
        shift = -torch.linalg.solve(matrix[left][:, left], matrix[left][:, done] @ error[done])[: len(rows)]
        torch.testing.assert_close((aim - case.weight[rows]).double(), shift, rtol=1e-3, atol=1e-6)


def test_a_linear_of_unknown_worth_in_the_same_group(case: Case) -> None:
    problem = GPTQ().problem("w", case.hessian, 128, torch.float16)
    half = N // 2
    gram = Hessian(case.gram.matrix[:half, :half].contiguous(), MANY)
    whole = Coupled(problem, [(slice(0, half), Worth.of("w", gram)), (slice(half, N), None)]).solve(case.weight, slice(0, N))
    alone = problem.solve(case.weight, slice(0, N))

    assert torch.equal(whole.linear.codes[half:], alone.linear.codes[half:])
    assert not torch.equal(whole.linear.codes[:half], alone.linear.codes[:half])


def test_losses_are_those_to_what_a_row_aims_at_by_itself(case: Case) -> None:
    drift = Drift(inputs=0.05 * case.hessian.matrix)
    problem = GPTQ().problem("w", replace(case.hessian, drift=drift), 128, torch.float16)
    solution = Coupled(problem, [(slice(0, N), Worth.of("w", case.gram))]).solve(case.weight, slice(0, N))
    aim = problem.aim(case.weight, slice(0, N))
    error = (aim - solution.value(torch.float32)).double()
    lost = (error @ case.hessian.matrix.double() * error).sum(dim=1)

    assert solution.losses.output is not None
    torch.testing.assert_close(solution.losses.output, lost, rtol=1e-4, atol=0)


def test_masks_that_are_given_stay_where_they_are(case: Case) -> None:
    """Rows are solved in another order than they are stored in."""
    kept = torch.zeros(N, K, dtype=torch.bool)
    kept.view(N, -1, 4)[torch.arange(N) % 2 == 0, :, :2] = True
    kept.view(N, -1, 4)[torch.arange(N) % 2 == 1, :, 2:] = True
    mask_solver = PRUNERS["default"].mask_solver("w", case.hessian, kept)
    problem = GPTQ().problem("w", case.hessian, 128, torch.float16, mask_solver)
    value = Coupled(problem, [(slice(0, N), Worth.of("w", case.gram))]).solve(case.weight, slice(0, N)).value(torch.float32)

    assert not bool(value[~kept].any())
    assert float((value != 0).float().mean()) > 0.4


def test_rows_cannot_be_solved_apart(case: Case) -> None:
    problem = GPTQ().problem("w", case.hessian, 128, torch.float16)
    with pytest.raises(AssertionError, match="solved together"):
        Coupled(problem, [(slice(0, N), Worth.of("w", case.gram))]).solve(case.weight[:4], slice(0, 4))
