"""GPTQ: error feedback column by column on a fixed INT4 grid, with the choices that decide its accuracy.

Two ways to scale. `conditional` (the MARLIN recipe) walks the columns in natural order and chooses a group's scale when the
sweep reaches it, on the weights as already corrected. `diagonal` chooses all scales first, on the original weights, and then
walks the columns by falling energy ("static act-order"): the columns that matter most are rounded first, while there are still
many columns left to pay for them, and the stored order of columns does not change.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from marlin_tools.algorithms.hessian import Hessian, corrected
from marlin_tools.algorithms.polish import polish
from marlin_tools.algorithms.scales import absmax, conditional, decode, diagonal, encode
from marlin_tools.algorithms.solved import Solved, as_solved
from marlin_tools.algorithms.sweep import BLOCK, sweep
from marlin_tools.settings import Settings


class GPTQ(Settings):
    """Settings of GPTQ.

    damp         added to the Hessian's diagonal, as a fraction of its mean
    order        columns in `natural` order or by falling `energy`
    scales       how scales are found: see `algorithms/scales.py`
    signed       let scales be negative
    polish       rounds of coordinate descent with scale refit after the sweep
    sequential   later groups of a block are calibrated on the quantised outputs of earlier ones
    drift        aim at weights that undo this share of what earlier rounding has done to the activations; the original
                 model then runs alongside, which costs a second forward
    """

    kind: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=10)
    order: Literal["natural", "energy"] = "energy"
    scales: Literal["absmax", "conditional", "diagonal"] = "diagonal"
    signed: bool = True
    polish: int = Field(4, ge=0, le=100)
    sequential: bool = True
    drift: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> "GPTQ":
        if self.scales == "conditional" and (self.order != "natural" or self.signed):
            raise ValueError("scales `conditional` are chosen as the sweep goes: they need order `natural` and signed `false`")
        if self.drift and not self.sequential:
            raise ValueError("`drift` is measured as the stream goes: it needs sequential `true`")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""
        return True

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the quantised outputs of earlier ones."""
        return self.sequential

    def solve(self, name: str, weight: Tensor, hessian: Hessian | None, group_size: int, dtype: torch.dtype) -> Solved:
        """Quantise one weight [N, K]; `dtype` is the model's own 16-bit type."""
        if hessian is None:
            raise ValueError("GPTQ needs a Hessian")
        original, weight = weight.float(), corrected(weight.float(), hessian, self.drift, self.damp)
        rule, order = self._rule(weight, hessian, group_size, dtype)
        factor = hessian.permuted(order).factorise(self.damp, name)
        sweep(weight[:, order], factor, rule)
        codes, scales = torch.empty_like(rule.codes), rule.scales
        codes[:, order] = rule.codes
        if self.polish:
            codes, scales = polish(weight, codes, scales, hessian.damped(factor.damp), dtype, self.polish)
        return as_solved(original, weight, codes, scales, hessian, factor.damp)

    def _rule(self, weight: Tensor, hessian: Hessian, group_size: int, dtype: torch.dtype) -> tuple["_FixedGrid", Tensor]:
        """The rule for the sweep, and the order in which it meets the columns."""
        n, k = weight.shape
        natural = torch.arange(k, device=weight.device)
        groups = weight.view(n, k // group_size, group_size)
        if self.scales == "conditional" and group_size != k:
            return _GridAsItGoes(torch.empty(n, k // group_size, device=weight.device), group_size, natural, dtype), natural
        if self.scales == "diagonal":
            energy = hessian.damped(self.damp).diagonal().view(-1, group_size)
            scales = diagonal(groups, energy, dtype, signed=self.signed)
        else:
            scales = absmax(groups, dtype)
        order = hessian.energy_order() if self.order == "energy" else natural
        return _FixedGrid(scales, group_size, order), order


class _FixedGrid:
    """The rule for scales that are known before the sweep. `order[j]` is the stored position of the sweep's column j."""

    def __init__(self, scales_ng: Tensor, group_size: int, order: Tensor) -> None:
        self.scales = scales_ng
        self.group_size = group_size
        self.group_of = (order // group_size).tolist()
        self.codes = torch.empty(scales_ng.shape[0], len(self.group_of), device=scales_ng.device)

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Nothing to decide: the grid is fixed."""

    def column(self, j: int, target_n: Tensor) -> Tensor:
        """The nearest level of the column's own grid."""
        scale = self.scales[:, self.group_of[j]]
        self.codes[:, j] = encode(target_n, scale)
        return decode(self.codes[:, j], scale)


class _GridAsItGoes(_FixedGrid):
    """The rule that chooses a group's scale when the sweep reaches it."""

    def __init__(self, scales_ng: Tensor, group_size: int, order: Tensor, dtype: torch.dtype) -> None:
        super().__init__(scales_ng, group_size, order)
        self.dtype = dtype
        assert group_size == BLOCK, (group_size, BLOCK)

    def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None:
        """Search the scale on the corrected weights, judged by the error that later columns cannot repair."""
        self.scales[:, start // self.group_size] = conditional(weight_nb, factor_bb, self.dtype)
