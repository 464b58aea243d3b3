"""2:4 pruning of one weight: which two of every four are kept, and what the kept ones become.

SparseGPT is the column sweep with a rule that rounds nothing: at the first column of a quad it looks at what the quad's four
columns should hold by now, gives up the two whose loss R[j, j]² t_j² is smallest, and every later column pays for them. That is
greedy twice over, in the positions and in the values. Two exact steps follow unless they are switched off: the least-squares
weights on the kept positions, and quad by quad the pair of positions that lowers the loss, by turns (`support.py`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.algorithms.hessian import Correction, Factor, Hessian
from marlin_tools.algorithms.masks import magnitude, two_largest, wanda
from marlin_tools.algorithms.solution import Losses, Solution, solve_all
from marlin_tools.algorithms.support import fit, reselect
from marlin_tools.algorithms.sweep import sweep
from marlin_tools.ops.solver.kernels import Grid
from marlin_tools.settings import Settings

_SLAB = 1 << 26
"""Weights that a GPU works on at a time."""


@dataclass(frozen=True)
class Placed:
    """A sparse weight: values [N, K], zero wherever `mask` is False."""

    value: Tensor
    mask: Tensor


class Pruner(Settings):
    """Settings of 2:4 pruning.

    mask         how the kept positions are chosen: `sparsegpt`, `wanda` or `magnitude`
    damp         added to the Hessian's diagonal, as a fraction of its mean
    fit          give the kept weights their least-squares values
    reselect     rounds of choosing every quad's positions again, each followed by a fit
    sequential   later groups of a block are calibrated on the pruned outputs of earlier ones
    drift        aim at weights that undo this share of what earlier pruning has done to the activations
    """

    mask: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    damp: float = Field(0.01, gt=0, le=10)
    fit: bool = True
    reselect: int = Field(3, ge=0, le=100)
    sequential: bool = True
    drift: float = Field(0.5, ge=0, le=1)

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""
        return self.mask != "magnitude" or self.fit or self.reselect > 0 or self.drift > 0

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the pruned outputs of earlier ones."""
        return self.sequential

    def problem(self, name: str, hessian: Hessian | None, dtype: torch.dtype = torch.float32) -> "PruningProblem":
        """What all rows of a group share; `dtype` is that of the result."""
        placing = self.placing(name, hessian)
        correction = None
        if hessian is not None and hessian.drift is not None and self.drift:
            natural = torch.arange(len(hessian.matrix), device=hessian.matrix.device)
            correction = Correction(hessian.drift, placing.known_factor, natural, self.drift)
        return PruningProblem(hessian, placing, correction, dtype)

    def prune(self, name: str, weight: Tensor, hessian: Hessian | None) -> Solution:
        """Prune one weight [N, K] to 2:4."""
        return solve_all(self.problem(name, hessian), weight)

    def placing(self, name: str, hessian: Hessian | None, fixed_nk: Tensor | None = None) -> "Placing":
        """What all rows have in common. Rows in which `fixed_nk` keeps anything keep just that."""
        if hessian is None and self.needs_data:
            raise ValueError("this way of pruning needs a Hessian")
        return Placing(self, hessian, None if hessian is None else hessian.factorize(self.damp, name), fixed_nk)


@dataclass(frozen=True)
class PruningProblem:
    """A group of linears to be pruned."""

    hessian: Hessian | None
    placing: "Placing"
    correction: Correction | None
    dtype: torch.dtype
    slab: int = _SLAB

    def solve(self, weight_nk: Tensor, rows: slice) -> Solution:
        """Rows never talk to each other: any of them can be pruned alone."""
        original = target = weight_nk.float()
        if self.correction is not None:
            target = self.correction.aim(weight_nk, rows)
        value = self.placing.place(target, rows).value
        damp = self.placing.factor.damp if self.placing.factor else None
        return Solution(value.to(self.dtype), Losses.of(original, target, value, self.hessian), damp)


class Placing:
    """A pruner with the Hessian that it works on, if it needs one."""

    def __init__(self, pruner: Pruner, hessian: Hessian | None, factor: Factor | None, fixed_nk: Tensor | None) -> None:
        self.pruner, self.hessian, self.factor, self._fixed_nk = pruner, hessian, factor, fixed_nk
        self._improves = pruner.fit or pruner.reselect > 0
        if hessian is not None and factor is not None and self._improves:
            self._damped_kk = hessian.damped(factor.damp)
            self._inverse_kk = factor.divide(torch.eye(len(self._damped_kk), device=self._damped_kk.device))

    @property
    def known_factor(self) -> Factor:
        """The factor of the Hessian that there is."""
        assert self.factor is not None, "pruning without data"
        return self.factor

    def place(self, target_nk: Tensor, rows: slice | None = None) -> Placed:
        """The sparse weight for these rows (all, if not said) that is nearest to `target_nk` in what it puts out."""
        fixed_nk = self._fixed_nk if rows is None or self._fixed_nk is None else self._fixed_nk[rows]
        free_n = torch.ones(len(target_nk), dtype=torch.bool, device=target_nk.device)
        if fixed_nk is not None:
            free_n = ~fixed_nk.any(dim=1)
        value_nk, mask_nk = self._first(target_nk)
        if fixed_nk is not None:
            mask_nk = torch.where(free_n[:, None], mask_nk, fixed_nk)
            value_nk = torch.where(free_n[:, None], value_nk, target_nk * mask_nk)
        if self._improves:
            value_nk, mask_nk = self._improved(target_nk, value_nk, mask_nk, free_n)
        return Placed(value_nk, mask_nk)

    def _first(self, target_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and values as the method itself leaves them."""
        if self.pruner.mask == "sparsegpt":
            rule = TwoOfFour(target_nk, self.known_factor)
            sweep(target_nk, self.known_factor, rule)
            return rule.values, rule.mask
        if self.pruner.mask == "wanda" and self.hessian is not None:
            mask_nk = wanda(target_nk, self.hessian.diagonal)
        else:
            mask_nk = magnitude(target_nk)
        return target_nk * mask_nk, mask_nk

    def _improved(self, target_nk: Tensor, value_nk: Tensor, mask_nk: Tensor, free_n: Tensor) -> tuple[Tensor, Tensor]:
        """Fit and reselect by turns, until no position changes; rows with a mask of their own are only fitted."""
        value_nk = fit(target_nk, value_nk, mask_nk, self._damped_kk, self._inverse_kk)
        if not bool(free_n.any()):
            return value_nk, mask_nk
        for _ in range(self.pruner.reselect):
            values, masks = reselect(target_nk[free_n], value_nk[free_n], mask_nk[free_n], self._damped_kk)
            if torch.equal(masks, mask_nk[free_n]):
                break
            mask_nk[free_n] = masks
            value_nk[free_n] = fit(target_nk[free_n], values, masks, self._damped_kk, self._inverse_kk)
        return value_nk, mask_nk


class TwoOfFour:
    """SparseGPT's rule for the sweep; the columns come in their stored order, quads never straddle blocks."""

    grid: Grid | None = None
    looks = False
    chooses = True

    def __init__(self, weight_nk: Tensor, factor: Factor) -> None:
        self.values = torch.zeros_like(weight_nk)
        self.mask = torch.zeros_like(weight_nk, dtype=torch.bool)
        self.codes = torch.empty(0)
        self._diagonal_k = factor.upper.diagonal()

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Nothing to decide for a whole block."""

    def quad(self, first: int, held_n4: Tensor) -> None:
        """Keep the two of columns `first` .. `first + 3` whose loss would be the largest, by what they hold now."""
        columns = slice(first, first + 4)
        self.mask[:, columns] = two_largest((held_n4 * self._diagonal_k[columns]).square())

    def column(self, j: int, target_n: Tensor) -> Tensor:
        """What it should hold, or nothing."""
        self.values[:, j] = torch.where(self.mask[:, j], target_n, 0.0)
        return self.values[:, j]


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner(mask="magnitude", fit=False, reselect=0, drift=0),
    "wanda": Pruner(mask="wanda", fit=False, reselect=0, drift=0),
    "sparsegpt": Pruner(fit=False, reselect=0, sequential=False, drift=0),
    "default": Pruner(),
}
"""The settings that people ask for by name; `sparsegpt` is the published method."""
