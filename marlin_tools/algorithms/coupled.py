"""Rows that make up for each other's errors.

A solver asks of every row alone that what it puts out is near. To the model some rows are worth more than others, and two that
err in opposite directions may cost it nothing together. With g the gradient of the model's loss at the outputs of a linear, and
G the mean over tokens of g gᵀ, an error E [N, K] of its weight costs about

    tr(G E H Eᵀ)        G and H as if they knew nothing of each other (K-FAC, arXiv 1503.05671; YAQA, arXiv 2505.22988)

H feeds errors back from column to column, and G does the same from row to row: with R Rᵀ = G, R upper triangular, the cost is
that of Rᵀ E row by row. Rows are solved a part at a time, those that are worth most first, each part aiming at what makes up
for the errors of all parts before it. How a part is solved is the solver's business.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Factor, Hessian
from marlin_tools.algorithms.solution import Losses, Problem, Rows, Solution
from marlin_tools.ops.solver.products import product

_PARTS = 16
"""Of the rows of a linear. On a small Llama, by G and random errors, as many parts as rows would cost 1 to 5 % less than 16."""

_DAMP, _NOISE = 0.1, 10.0
"""How G is damped (`hessian.py`): more than H, since it is seen on less text. With 16,000 tokens of a small Llama 0.01 and 1
took what wide linears cost on other text to 1.06 times that of rows solved apart; these leave it at 1.
"""


@runtime_checkable
class Aiming(Problem, Protocol):
    """A problem whose rows can be solved towards another weight than their own."""

    @property
    def hessian(self) -> Hessian | None:
        """What the group reads."""

    def aim(self, weight_nk: Tensor, rows: Rows) -> Tensor:
        """The float32 weight that these rows of the group aim at by themselves."""

    def solve(self, weight_nk: Tensor, rows: Rows, aim_nk: Tensor | None = None) -> Solution:
        """The solution nearest to `aim`, or to what they aim at by themselves, for these rows; `weight` is what they are."""


@dataclass(frozen=True)
class Worth:
    """What the outputs of one linear are worth: `factor` is that of G with its rows in `order`, the dearest first."""

    order: Tensor
    factor: Factor

    @classmethod
    def of(cls, name: str, gram: Hessian) -> "Worth":
        """From G itself, as damped as what it was seen on asks for."""
        gram = gram.unsure(_NOISE)
        order = gram.energy_order()
        return cls(order, gram.factorize(_DAMP, name, order))


@dataclass(frozen=True)
class Coupled:
    """A problem whose rows are told of each other; to be solved as a whole. `worths` are of all its linears, by their rows."""

    inner: Aiming
    worths: Sequence[tuple[slice, Worth | None]]
    slab: int = sys.maxsize

    def solve(self, weight_nk: Tensor, rows: slice) -> Solution:
        """The rows of every linear, part after part; errors are those to what each row aims at by itself."""
        assert rows == slice(0, self.worths[-1][0].stop), "rows that are told of each other are solved together"
        aim_nk = self.inner.aim(weight_nk, rows)
        places, parts = [], []
        for own, worth in self.worths:
            for place, part in self._solved(weight_nk[own], aim_nk[own], worth, own.start):
                places.append(place)
                parts.append(part)
        back = torch.argsort(torch.cat(places))
        whole = Solution.join(parts).map(lambda rows: rows[back])
        losses = Losses.of(weight_nk.float(), aim_nk, whole.value(torch.float32), self.inner.hessian)
        return replace(whole, losses=losses)

    def _solved(self, weight_nk: Tensor, aim_nk: Tensor, worth: Worth | None, first: int) -> Sequence[tuple[Tensor, Solution]]:
        """The parts of one linear, whose rows begin with `first` in the group, and which rows of the group they are."""
        count = len(weight_nk)
        if worth is None:
            everything = torch.arange(first, first + count, device=weight_nk.device)
            return [(everything, self.inner.solve(weight_nk, slice(first, first + count), aim_nk))]
        solved: list[tuple[Tensor, Solution]] = []
        upper, error_nk, start = worth.factor.upper, torch.zeros_like(aim_nk), 0  # rows in their order
        for rows in worth.order.chunk(_PARTS):
            part = slice(start, start + len(rows))
            target_nk = own_nk = aim_nk[rows]
            if start:
                owed_nk = product(upper[:start, part].T.contiguous(), error_nk[:start])
                target_nk = own_nk - torch.linalg.solve_triangular(upper[part, part].T, owed_nk, upper=False).contiguous()
            solution = self.inner.solve(weight_nk[rows], rows + first, target_nk)
            error_nk[part] = solution.value(torch.float32) - own_nk
            solved.append((rows + first, solution))
            start += len(rows)
        return solved
