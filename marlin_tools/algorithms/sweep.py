"""THE loop: one walk over the columns in which every column pays for the rounding errors of the columns before it.

GPTQ, SparseGPT and their joint form are this loop with different rules. With H = R Rᵀ (R upper) and M = R / diag(R), the column
to round is

    t_i = w_i + Σ_{j<i} (w_j - q_j) · M[j, i]            and           loss = Σ_i R[i, i]² (t_i - q_i)²

which is the original GPTQ update written left-looking: column i gathers what it owes instead of every column scattering what it
did. Rows never talk to each other, so they may be split, stacked (q, k and v share one Hessian) or solved on several devices.

Shape letters: N rows (outputs), K columns (inputs), B columns per block.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Factor
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver.kernels import BLOCK, Grid
from marlin_tools.ops.solver.products import Parts, product

WIDE = 512
"""Columns whose debts to all columns before them are computed in one product on a GPU."""

Settle = Callable[[int, Tensor, Tensor, Tensor], None]
"""Decides all columns of the block at `start`, given what they owe and their part of M, and fills their errors in [N, K]."""


class Rule(Protocol):
    """What distinguishes one algorithm from another.

    grid    all there is to the rule, where it rounds every column to scales that are known once its block is entered: then
            kernels can follow it, and leave the codes in `codes`
    looks   whether `enter` wants to see the weights
    chooses whether `quad` is to be called at the first of every four columns
    """

    grid: Grid | None
    looks: bool
    chooses: bool
    codes: Tensor

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Columns from `start` on come next. `weight_nb` is what they hold once all earlier errors are paid in the best way."""

    def quad(self, first: int, held_n4: Tensor) -> None:
        """Columns `first` to `first + 3` come next; this is what they hold once all errors so far are paid in the best way."""

    def column(self, j: int, target_n: Tensor) -> Tensor:
        """The value [N] that column `j` gets, given the value that it should have."""


def sweep(weight_nk: Tensor, factor: Factor, rule: Rule) -> None:
    """Walk the columns left to right; `rule` decides each one and keeps what it decided."""
    if solver.runs_on(weight_nk) and rule.grid is not None:
        rule.codes = _fused_sweep(weight_nk, factor, rule, rule.grid)
        return
    upper, feedback = factor.upper, factor.feedback()
    errors_nk = torch.zeros_like(weight_nk)
    for start in range(0, weight_nk.shape[1], BLOCK):
        stop = min(start + BLOCK, weight_nk.shape[1])
        owed_nb = errors_nk[:, :start] @ feedback[:start, start:stop]
        target_nb = weight_nk[:, start:stop] + owed_nb
        rule.enter(
            start, weight_nk[:, start:stop] + _spread(owed_nb, feedback[start:stop, start:stop]), upper[start:stop, start:stop]
        )
        for j in range(start, stop):
            i = j - start
            if rule.chooses and j % 4 == 0:
                quad_nb, square = slice(i, i + 4), slice(j, j + 4)
                due_n4 = target_nb[:, quad_nb] - weight_nk[:, square]
                rule.quad(j, weight_nk[:, square] + _spread(due_n4, feedback[square, square]))
            errors_nk[:, j] = weight_nk[:, j] - rule.column(j, target_nb[:, i])
            target_nb[:, i + 1 :].addr_(errors_nk[:, j], feedback[j, j + 1 : stop])


def _fused_sweep(weight_nk: Tensor, factor: Factor, rule: Rule, grid: Grid) -> Tensor:
    """The same by kernels."""
    codes_nk = torch.empty(weight_nk.shape, dtype=torch.uint8, device=weight_nk.device)

    def settle(start: int, owed_nb: Tensor, feedback_bb: Tensor, errors_nk: Tensor) -> None:
        if rule.looks:
            square = slice(start, start + len(feedback_bb))
            seen_nb = weight_nk[:, square] + _spread(owed_nb, feedback_bb)
            rule.enter(start, seen_nb, factor.upper[square, square])
        solver.sweep_block(weight_nk, owed_nb, feedback_bb, grid, codes_nk, errors_nk, start)

    by_blocks(weight_nk, factor, settle)
    return codes_nk


def by_blocks(weight_nk: Tensor, factor: Factor, settle: Settle) -> None:
    """The walk along blocks: one large product for what many columns owe to all before them, a small one for each block."""
    k = weight_nk.shape[1]
    errors_nk = torch.empty_like(weight_nk)
    past = Parts.like(errors_nk)
    for first in range(0, k, WIDE):
        last = min(first + WIDE, k)
        feedback_kw = factor.feedback(first, last)
        owed_nw = product(past[:first], feedback_kw[:first])
        for start in range(first, last, BLOCK):
            block = slice(start - first, min(start + BLOCK, last) - first)
            owed_nb = torch.addmm(owed_nw[:, block], errors_nk[:, first:start], feedback_kw[first:start, block])
            settle(start, owed_nb, feedback_kw[start : first + block.stop, block], errors_nk)
        past.put(slice(first, last), errors_nk[:, first:last])


def _spread(owed_nb: Tensor, feedback_bb: Tensor) -> Tensor:
    """What is owed at the door of a block, when its columns share it in the best way: x with x · M_bb = owed."""
    return torch.linalg.solve_triangular(feedback_bb, owed_nb, upper=True, left=False, unitriangular=True)
