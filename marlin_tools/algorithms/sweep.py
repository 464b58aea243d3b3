"""THE loop: one walk over the columns in which every column pays for the rounding errors of the columns before it.

GPTQ, SparseGPT and their joint form are this loop with different rules. With H = R Rᵀ (R upper) and M = R / diag(R), the column
to round is

    t_i = w_i + Σ_{j<i} (w_j - q_j) · M[j, i]            and           loss = Σ_i R[i, i]² (t_i - q_i)²

which is the original GPTQ update written left-looking: column i gathers what it owes instead of every column scattering what it
did. Rows never talk to each other, so they may be split, stacked (q, k and v share one Hessian) or solved on several devices.

Shape letters: N rows (outputs), K columns (inputs), B columns per block.
"""

from typing import Protocol

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Factor

BLOCK = 128


class Rule(Protocol):
    """What distinguishes one algorithm from another."""

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Columns from `start` on come next. `weight_nb` is what they hold once all earlier errors are paid in the best way."""

    def column(self, j: int, target_n: Tensor) -> Tensor:
        """The value [N] that column `j` gets, given the value that it should have."""


def sweep(weight_nk: Tensor, factor: Factor, rule: Rule) -> None:
    """Walk the columns left to right; `rule` decides each one and keeps what it decided."""
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
            errors_nk[:, j] = weight_nk[:, j] - rule.column(j, target_nb[:, i])
            target_nb[:, i + 1 :].addr_(errors_nk[:, j], feedback[j, j + 1 : stop])


def _spread(owed_nb: Tensor, feedback_bb: Tensor) -> Tensor:
    """What is owed at the door of a block, when its columns share it in the best way: x with x · M_bb = owed."""
    return torch.linalg.solve_triangular(feedback_bb, owed_nb, upper=True, left=False, unitriangular=True)
