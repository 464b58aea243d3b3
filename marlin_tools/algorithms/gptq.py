"""GPTQ: error feedback column by column on a fixed INT4 grid, with the choices that decide its accuracy.

Two ways to scale. `conditional` (the MARLIN recipe) walks the columns in natural order and chooses a group's scale when the
sweep reaches it, on the weights as already corrected. `diagonal` chooses all scales first, on the original weights, and then
walks the columns by falling energy ("static act-order"): the columns that matter most are rounded first, while there are still
many columns left to pay for them, and the stored order of columns does not change.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from marlin_tools.algorithms.hessian import ALONE, Correction, Factor, Hessian, Sharing
from marlin_tools.algorithms.polish import polish
from marlin_tools.algorithms.pruning import MaskSolver
from marlin_tools.algorithms.quantizer import Quantizer
from marlin_tools.algorithms.scales import absmax, conditional, decode, diagonal, encode, too_large
from marlin_tools.algorithms.solution import SLAB, Rows, Solution
from marlin_tools.algorithms.sweep import sweep
from marlin_tools.errors import RecipeError
from marlin_tools.ops.solver.kernels import BLOCK, Grid
from marlin_tools.quantized import ZERO
from marlin_tools.stopwatch import span


class GPTQ(Quantizer):
    """Settings of GPTQ.

    damp         added to the Hessian's diagonal, as a fraction of its mean
    noise        how much damping grows where few tokens were seen for each input (`Hessian.unsure`)
    order        columns in `natural` order or by falling `energy`
    scales       how scales are found: see `algorithms/scales.py`
    signed       let scales be negative
    polish       rounds of coordinate descent with scale refit after the sweep
    sequential   later groups of a block are calibrated on the quantised outputs of earlier ones
    drift        aim at weights that undo this share of what earlier rounding has done to the activations; the original
                 model then runs alongside, which costs a second forward
    guided       rows make up for each other by what their outputs are worth to the model (`coupled.py`), which is found out
                 by a forward and a backward of the original on some of the text, before all else
    """

    kind: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=10)
    noise: float = Field(1.0, ge=0, le=100)
    order: Literal["natural", "energy"] = "energy"
    scales: Literal["absmax", "conditional", "diagonal"] = "diagonal"
    signed: bool = True
    polish: int = Field(1, ge=0, le=100)
    sequential: bool = True
    drift: float = Field(0.5, ge=0, le=1)
    guided: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "GPTQ":
        if self.scales == "conditional" and (self.order != "natural" or self.signed):
            raise ValueError("scales `conditional` are chosen as the sweep goes: they need order `natural` and signed `false`")
        if self.drift and not self.sequential:
            raise ValueError("`drift` is measured as the stream goes: it needs sequential `true`")
        return self

    def check_group_size(self, group_size: int, k: int) -> None:
        """Refuse groups that the search for scales cannot follow."""
        if self.scales == "conditional" and group_size not in (k, -1) and BLOCK % group_size:
            raise RecipeError(
                f"scales `conditional` (preset `marlin`) know groups that divide {BLOCK} and per column, not of {group_size}",
                hint=f"choose `--group-size {BLOCK}`, `64`, `32` or `-1`, or another `--preset`",
            )

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""
        return True

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the quantised outputs of earlier ones."""
        return self.sequential

    def problem(
        self,
        name: str,
        hessian: Hessian | None,
        group_size: int,
        dtype: torch.dtype,
        mask_solver: MaskSolver | None = None,
        sharing: Sharing = ALONE,
    ) -> "GPTQProblem":
        """What all rows of a group share; `dtype` is the model's own 16-bit type, `mask_solver` makes rows 2:4 on the way."""
        if hessian is None:
            raise ValueError("GPTQ needs a Hessian")
        self.check_group_size(group_size, len(hessian.matrix))
        hessian = hessian.unsure(self.noise)
        order = self._order(hessian)
        with span("factor"):
            factor = hessian.factorize(self.damp, name, order, sharing)
        correction = None
        if hessian.drift is not None and self.drift:
            with span("correct"):
                correction = Correction(hessian.drift, factor, order, self.drift, sharing)
        damped = hessian.damped(factor.damp) if self.polish else None
        return GPTQProblem(self, hessian, order, factor, group_size, dtype, mask_solver, correction, damped)

    def attempt(self, hessian: Hessian, group_size: int, dtype: torch.dtype) -> "tuple[GPTQProblem, Tensor]":
        """The same without drift, masks and other dampings, and without waiting for the device; and 0 if that is a problem.

        `hessian` says how unsure it is.
        """
        order = self._order(hessian)
        factor, failed = hessian.attempt(self.damp, order)
        damped = hessian.damped(self.damp) if self.polish else None
        return GPTQProblem(self, hessian, order, factor, group_size, dtype, None, None, damped, looks=False), failed

    def _order(self, hessian: Hessian) -> Tensor:
        """Stored positions of the columns, as the sweep walks them."""
        if self.order == "energy":
            return hessian.energy_order()
        return torch.arange(len(hessian.matrix), device=hessian.matrix.device)


@dataclass(frozen=True)
class GPTQProblem:
    """What all rows share: `order[j]` is the stored position of the sweep's column j, `factor` that of H in this order.

    damped   H with its damping, for the polish; None if there is none
    looks    whether scales are looked at, to refuse what is not finite: that waits for the device
    """

    settings: GPTQ
    hessian: Hessian
    order: Tensor
    factor: Factor
    group_size: int
    dtype: torch.dtype
    mask_solver: MaskSolver | None
    correction: Correction | None
    damped: Tensor | None
    slab: int = SLAB
    looks: bool = True

    def aim(self, weight_nk: Tensor, rows: Rows) -> Tensor:
        """The float32 weight that these rows aim at by themselves: as they are, or what undoes some of the drift."""
        if self.correction is None:
            return weight_nk.float()
        with span("correct"):
            return self.correction.aim(weight_nk, rows)

    def solve(self, weight_nk: Tensor, rows: Rows, aim_nk: Tensor | None = None) -> Solution:
        """Rows never talk to each other: any of them can be solved alone."""
        order, factor = self.order, self.factor
        weight = self.aim(weight_nk, rows) if aim_nk is None else aim_nk
        aim, mask = weight, None
        if self.mask_solver is not None:
            placed = self.mask_solver.place(weight, rows)
            aim, mask = placed.value, placed.mask
        with span("scales"):
            rule = self._rule(aim, mask)
        with span("sweep"):
            sweep(aim[:, order], factor, rule)
            codes, scales = torch.empty_like(rule.codes), rule.scales
            codes[:, order] = rule.codes
        if self.damped is not None:
            with span("polish"):
                codes, scales = polish(weight, codes, scales, self.damped, self.dtype, self.settings.polish, mask)
        if self.looks and not bool(torch.isfinite(scales).all()):
            raise too_large()
        with span("judge"):
            return Solution.quantized(weight_nk.float(), weight, codes, scales, self.hessian, factor.damp)

    def _rule(self, weight: Tensor, mask: Tensor | None) -> "_FixedGrid":
        """The rule for the sweep; `mask` as in the stored order of columns."""
        n, k = weight.shape
        settings, group_size, order, dtype = self.settings, self.group_size, self.order, self.dtype
        groups = weight.view(n, k // group_size, group_size)
        kept = None if mask is None else mask[:, order].contiguous()
        if settings.scales == "conditional" and group_size != k:
            return _GridAsItGoes(torch.empty(n, k // group_size, device=weight.device), self, kept)
        if settings.scales == "diagonal":
            energy = self.hessian.diagonal + self.hessian.ridge(settings.damp)
            scales = diagonal(groups, energy.view(-1, group_size), dtype, signed=settings.signed)
        else:
            scales = absmax(groups, dtype)
        return _FixedGrid(scales, self, kept)


class _FixedGrid:
    """The rule for scales known before the sweep. `mask` [N, K], in its order of columns, is False where zero is forced."""

    looks = False
    chooses = False

    def __init__(self, scales_ng: Tensor, problem: GPTQProblem, mask: Tensor | None) -> None:
        self.scales = scales_ng
        self.mask = mask
        group_of = problem.order // problem.group_size
        self.grid: Grid | None = Grid(scales_ng, group_of.to(torch.int32), mask)
        self.group_of = [] if scales_ng.is_cuda else group_of.tolist()
        self.codes = torch.empty(scales_ng.shape[0], 0 if scales_ng.is_cuda else len(group_of), device=scales_ng.device)

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Nothing to decide: the grid is fixed."""

    def quad(self, first: int, held_n4: Tensor) -> None:
        """Nothing to choose: the mask is given."""

    def column(self, j: int, target_n: Tensor) -> Tensor:
        """The nearest level of the column's own grid."""
        scale = self.scales[:, self.group_of[j]]
        code = encode(target_n, scale)
        self.codes[:, j] = code if self.mask is None else torch.where(self.mask[:, j], code, ZERO)
        return decode(self.codes[:, j], scale)


class _GridAsItGoes(_FixedGrid):
    """The rule that chooses the scales of a block's groups when the sweep reaches it; the paper has one group in a block."""

    looks = True

    def __init__(self, scales_ng: Tensor, problem: GPTQProblem, mask: Tensor | None) -> None:
        super().__init__(scales_ng, problem, mask)
        self.dtype, self.size = problem.dtype, problem.group_size
        assert BLOCK % self.size == 0, (self.size, BLOCK)

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Search each group's scale on the corrected weights, judged by the error that later columns cannot repair."""
        if self.mask is not None:
            weight_nb = weight_nb * self.mask[:, start : start + BLOCK]
        for first in range(0, weight_nb.shape[1], self.size):
            group = slice(first, first + self.size)
            self.scales[:, (start + first) // self.size] = conditional(weight_nb[:, group], factor_bb[group, group], self.dtype)
