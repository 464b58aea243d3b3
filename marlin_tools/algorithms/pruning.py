"""2:4 pruning of one weight: which two of every four are kept, and what the kept ones become.

SparseGPT is the column sweep with a rule that rounds nothing: at the first column of a quad it looks at what the quad's four
columns should hold by now, gives up the two whose loss R[j, j]² t_j² is smallest, and every later column pays for them. That is
greedy twice over, in the positions and in the values. Two exact steps follow by turns unless they are switched off: quad by
quad the pair of positions that lowers the loss, and the least-squares weights on all that are kept (`support.py`).

`alternation.py` chooses all positions of a row together instead, which is better where there is much text.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.algorithms.alternation import Alternation
from marlin_tools.algorithms.hessian import Correction, Factor, Hessian
from marlin_tools.algorithms.masks import magnitude, two_largest, wanda
from marlin_tools.algorithms.solution import Losses, Rows, Solution, finite, solve_all
from marlin_tools.algorithms.support import fit, reselect
from marlin_tools.algorithms.sweep import by_blocks, sweep
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver.kernels import Grid
from marlin_tools.settings import Settings, one_of
from marlin_tools.stopwatch import span

_SLAB = 1 << 26
"""Weights that a GPU works on at a time."""

_ROUNDS = 3
"""How often all quads are chosen again between two fits."""

_COARSE = 3e-4
"""The tolerance of a fit after which positions change again; what it leaves, the next round and the last fit find."""


@dataclass(frozen=True)
class SparseWeight:
    """A sparse weight: values [N, K], zero wherever `mask` is False."""

    value: Tensor
    mask: Tensor


class Pruner(Settings):
    """Settings of 2:4 pruning.

    mask         how the kept positions are chosen: `sparsegpt`, `wanda`, `magnitude`, or `alternation`, all of a row together
    damp         added to the Hessian's diagonal, as a fraction of its mean
    noise        how much damping grows where few tokens were seen for each input (`Hessian.unsure`)
    fit          give the kept weights their least-squares values
    reselect     turns of choosing every quad's positions again, each followed by a fit
    sequential   later groups of a block are calibrated on the pruned outputs of earlier ones
    drift        aim at weights that undo this share of what earlier pruning has done to the activations
    guided       rows make up for each other by what their outputs are worth to the model (`coupled.py`)
    """

    mask: Literal["sparsegpt", "wanda", "magnitude", "alternation"] = "sparsegpt"
    damp: float = Field(0.01, gt=0, le=10)
    noise: float = Field(1.0, ge=0, le=100)
    fit: bool = True
    reselect: int = Field(2, ge=0, le=100)
    sequential: bool = True
    drift: float = Field(0.5, ge=0, le=1)
    guided: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""
        return self.mask != "magnitude" or self.fit or self.reselect > 0 or self.drift > 0 or self.guided

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the pruned outputs of earlier ones."""
        return self.sequential

    def problem(self, name: str, hessian: Hessian | None, dtype: torch.dtype = torch.float32) -> "PruningProblem":
        """What all rows of a group share; `dtype` is that of the result."""
        mask_solver = self.mask_solver(name, hessian)
        correction = None
        if hessian is not None and hessian.drift is not None and self.drift:
            natural = torch.arange(len(hessian.matrix), device=hessian.matrix.device)
            correction = Correction(hessian.drift, mask_solver.known_factor, natural, self.drift)
        return PruningProblem(hessian, mask_solver, correction, dtype)

    def prune(self, name: str, weight: Tensor, hessian: Hessian | None) -> Solution:
        """Prune one weight [N, K] to 2:4."""
        return finite(name, solve_all(self.problem(name, hessian), weight))

    def mask_solver(self, name: str, hessian: Hessian | None, fixed_nk: Tensor | None = None) -> "MaskSolver":
        """What all rows have in common. Rows in which `fixed_nk` keeps anything keep just that."""
        if hessian is None and self.needs_data:
            raise ValueError("this way of pruning needs a Hessian")
        hessian = None if hessian is None else hessian.unsure(self.noise)
        with span("factor"):
            factor = None if hessian is None else hessian.factorize(self.damp, name)
        return MaskSolver(self, hessian, factor, fixed_nk)


@dataclass(frozen=True)
class PruningProblem:
    """A group of linears to be pruned."""

    hessian: Hessian | None
    mask_solver: "MaskSolver"
    correction: Correction | None
    dtype: torch.dtype
    slab: int = _SLAB

    def aim(self, weight_nk: Tensor, rows: Rows) -> Tensor:
        """The float32 weight that these rows aim at by themselves: as they are, or what undoes some of the drift."""
        return weight_nk.float() if self.correction is None else self.correction.aim(weight_nk, rows)

    def solve(self, weight_nk: Tensor, rows: Rows, aim_nk: Tensor | None = None) -> Solution:
        """Rows never talk to each other: any of them can be pruned alone."""
        target = self.aim(weight_nk, rows) if aim_nk is None else aim_nk
        value = self.mask_solver.place(target, rows).value
        damp = self.mask_solver.factor.damp if self.mask_solver.factor else None
        return Solution(value.to(self.dtype), Losses.of(weight_nk.float(), target, value, self.hessian), damp)


class MaskSolver:
    """A pruner with the Hessian that it works on, if it needs one."""

    def __init__(self, pruner: Pruner, hessian: Hessian | None, factor: Factor | None, fixed_nk: Tensor | None) -> None:
        self.pruner, self.hessian, self.factor, self._fixed_nk = pruner, hessian, factor, fixed_nk
        if hessian is not None and factor is not None and (pruner.fit or pruner.reselect or pruner.mask == "alternation"):
            self._damped_kk = hessian.damped(factor.damp)

    @property
    def known_factor(self) -> Factor:
        """The factor of the Hessian that there is."""
        assert self.factor is not None, "pruning without data"
        return self.factor

    def place(self, target_nk: Tensor, rows: Rows | None = None) -> SparseWeight:
        """The sparse weight for these rows (all, if not said) that is nearest to `target_nk` in what it puts out."""
        fixed_nk = self._fixed_nk if rows is None or self._fixed_nk is None else self._fixed_nk[rows]
        if fixed_nk is None:
            value_nk, mask_nk = self._chosen(target_nk)
        else:
            free_n, value_nk, mask_nk = ~fixed_nk.any(dim=1), target_nk * fixed_nk, fixed_nk.clone()
            if bool(free_n.any()):
                value_nk[free_n], mask_nk[free_n] = self._chosen(target_nk[free_n])
        if self.pruner.fit:
            with span("fit"):
                value_nk = fit(target_nk, value_nk, mask_nk, self._damped_kk)
        return SparseWeight(value_nk, mask_nk)

    def _chosen(self, target_nk: Tensor) -> tuple[Tensor, Tensor]:
        """The values and the mask of rows that have none yet, chosen again until no position changes."""
        with span("choose"):
            value_nk, mask_nk = self._first(target_nk)
        for number in range(_ROUNDS * self.pruner.reselect):
            if self.pruner.fit and number and number % _ROUNDS == 0:
                with span("fit"):
                    value_nk = fit(target_nk, value_nk, mask_nk, self._damped_kk, _COARSE)
            before_nk = mask_nk
            with span("reselect"):
                value_nk, mask_nk = reselect(target_nk, value_nk, mask_nk, self._damped_kk)
            if torch.equal(mask_nk, before_nk):
                break
        return value_nk, mask_nk

    @cached_property
    def _alternation(self) -> Alternation:
        return Alternation(self._damped_kk)

    def _first(self, target_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and values as the method itself leaves them."""
        if self.pruner.mask == "alternation":
            return self._alternation.choose(target_nk)
        if self.pruner.mask == "sparsegpt":
            if solver.runs_on(target_nk):
                return _chosen_by_kernels(target_nk, self.known_factor)
            rule = TwoOfFour(target_nk, self.known_factor)
            sweep(target_nk, self.known_factor, rule)
            return rule.values, rule.mask
        if self.pruner.mask == "wanda" and self.hessian is not None:
            mask_nk = wanda(target_nk, self.hessian.diagonal)
        else:
            mask_nk = magnitude(target_nk)
        return target_nk * mask_nk, mask_nk


def _chosen_by_kernels(target_nk: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """What `TwoOfFour` leaves, values and mask."""
    value_nk, mask_nk = torch.empty_like(target_nk), torch.empty_like(target_nk, dtype=torch.bool)
    diagonal_k = factor.upper.diagonal().contiguous()

    def settle(start: int, owed_nb: Tensor, feedback_bb: Tensor, errors_nk: Tensor) -> None:
        solver.choose_block(target_nk, owed_nb, feedback_bb, diagonal_k, (mask_nk, value_nk, errors_nk), start)

    by_blocks(target_nk, factor, settle)
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
    "magnitude": Pruner(mask="magnitude", noise=0, fit=False, reselect=0, drift=0),
    "wanda": Pruner(mask="wanda", noise=0, fit=False, reselect=0, drift=0),
    "sparsegpt": Pruner(noise=0, fit=False, reselect=0, sequential=False, drift=0),
    "default": Pruner(),
    "max": Pruner(mask="alternation", reselect=1, drift=0.75, guided=True),
}
"""The settings that people ask for by name; `sparsegpt` is the published method."""

PrunerName = Annotated[str, one_of("preset", PRUNERS)]
"""What a setting that names one of them holds."""
