"""What a solver returns: the new weight and how well that went, row by row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.errors import NumericalError
from marlin_tools.ops.solver.products import rough_product
from marlin_tools.quantized import QuantizedLinear

SLAB = 1 << 27
"""Weights that a GPU works on at a time."""


def slabs(rows: slice, k: int, *, on_gpu: bool, size: int = SLAB) -> list[slice]:
    """These rows of `k` weights in pieces that a GPU can work on; a CPU takes them all at once."""
    step = max(1, size // k) if on_gpu else max(1, rows.stop - rows.start)
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


Rows = slice | Tensor
"""Rows of a group: neighbours, or their numbers."""


@dataclass(frozen=True)
class Losses:
    """What the new weight loses, row by row.

    output, output_energy   [N] squared error of the output on the calibration activations, and the squared output itself;
                            None without data
    weight, weight_energy   [N] the same of the weights themselves
    """

    output: Tensor | None
    output_energy: Tensor | None
    weight: Tensor
    weight_energy: Tensor

    @classmethod
    def of(cls, weight_nk: Tensor, target_nk: Tensor, value_nk: Tensor, hessian: Hessian | None) -> "Losses":
        """Between `value` and the weight that the solver aimed at, relative to the original weight."""
        output = energy = None
        if hessian is not None:
            error_nk = target_nk - value_nk
            output = (rough_product(error_nk, hessian.matrix) * error_nk).sum(dim=1, dtype=torch.float64)
            energy = (rough_product(weight_nk, hessian.matrix) * weight_nk).sum(dim=1, dtype=torch.float64)
        weight_lost = (weight_nk - value_nk).square().sum(dim=1, dtype=torch.float64)
        return cls(output, energy, weight_lost, weight_nk.square().sum(dim=1, dtype=torch.float64))

    def by_row(self) -> Tensor:
        """Of each row: of the weight and its energy, and of the output and its energy if they are known [N, 2 or 4]."""
        there = (self.weight, self.weight_energy, self.output, self.output_energy)
        return torch.stack([each for each in there if each is not None], dim=1)


@dataclass(frozen=True)
class Solution:
    """The result for some rows of one weight, or of several stacked ones.

    weight   codes and scales, or the weight itself where nothing is quantized
    losses   how well that went
    damp     the damping really used; None if there was none
    """

    weight: QuantizedLinear | Tensor
    losses: Losses
    damp: float | None

    @classmethod
    def quantized(
        cls,
        weight_nk: Tensor,
        target_nk: Tensor,
        codes_nk: Tensor,
        scales_ng: Tensor,
        hessian: Hessian | None,
        damp: float | None,
    ) -> "Solution":
        """From codes and scales in float; outputs are measured against the weight that the solver aimed at."""
        linear = QuantizedLinear(
            codes_nk.to(torch.uint8), scales_ng.to(torch.float16), weight_nk.shape[1] // scales_ng.shape[1]
        )
        return cls(linear, Losses.of(weight_nk, target_nk, linear.dequantize(), hessian), damp)

    @property
    def linear(self) -> QuantizedLinear:
        """The codes and scales."""
        assert isinstance(self.weight, QuantizedLinear), "nothing was quantized"
        return self.weight

    @property
    def dense(self) -> Tensor:
        """The weight where nothing is quantized."""
        assert isinstance(self.weight, Tensor), "the weight was quantized"
        return self.weight

    def value(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] to compute with from here on."""
        return self.weight.dequantize(dtype) if isinstance(self.weight, QuantizedLinear) else self.weight.to(dtype)

    @cached_property
    def _lost(self) -> tuple[float | None, float]:
        return self.lost(self.losses.by_row().sum(dim=0).tolist())

    @staticmethod
    def lost(sums: Sequence[float]) -> tuple[float | None, float]:
        """What the sums of `Losses.by_row` say: the error of the output, if that is known, and of the weight."""
        return (_ratio(*sums[2:]) if len(sums) > 2 else None), _ratio(*sums[:2])

    @property
    def output_error(self) -> float | None:
        """Squared output error relative to the squared output."""
        return self._lost[0]

    @property
    def weight_error(self) -> float:
        """Squared weight error relative to the squared weight."""
        return self._lost[1]

    def __getitem__(self, rows: slice) -> "Solution":
        """Some rows of it."""
        return self.map(lambda whole: whole[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Solution":
        """The same change to everything that has a row for each output."""
        weight = self.weight
        changed = (
            QuantizedLinear(change(weight.codes), change(weight.scales), weight.group_size)
            if isinstance(weight, QuantizedLinear)
            else change(weight)
        )
        found = {each.name: getattr(self.losses, each.name) for each in fields(Losses)}
        losses: dict[str, Any] = {name: None if tensor is None else change(tensor) for name, tensor in found.items()}
        return Solution(changed, Losses(**losses), self.damp)

    def tensors(self) -> list[Tensor]:
        """Everything that has a row for each output."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    @staticmethod
    def join(parts: Sequence["Solution"]) -> "Solution":
        """The results for some rows each, put under each other."""
        if len(parts) == 1:
            return parts[0]
        losses: dict[str, Any] = {
            each.name: _stacked([getattr(part.losses, each.name) for part in parts]) for each in fields(Losses)
        }
        weight: QuantizedLinear | Tensor
        if isinstance(parts[0].weight, QuantizedLinear):
            linears = [part.linear for part in parts]
            codes, scales = torch.cat([each.codes for each in linears]), torch.cat([each.scales for each in linears])
            weight = QuantizedLinear(codes, scales, linears[0].group_size)
        else:
            weight = torch.cat([part.dense for part in parts])
        return Solution(weight, Losses(**losses), parts[0].damp)


def finite(name: str, solution: Solution) -> Solution:
    """The solution of a linear, unless it is none."""
    check_finite(name, solution.output_error, solution.weight_error)
    return solution


def check_finite(name: str, output_error: float | None, weight_error: float) -> None:
    """Refuse what is no solution of a linear: looked at once it is whole, so that a GPU is waited for once."""
    if not math.isfinite(output_error or 0.0) or not math.isfinite(weight_error):
        hint = "try a higher `--damp`, or leave it out with `--ignore`"
        raise NumericalError(f"`{name}`: the solution is not finite", hint=hint)


class Problem(Protocol):
    """One group of linears, ready to be solved: what all rows share is known."""

    @property
    def slab(self) -> int:
        """Weights that a GPU works on at a time."""

    def solve(self, weight_nk: Tensor, rows: slice) -> Solution:
        """The solution for these rows of the group; `weight` is what they are."""


def solve_all(problem: Problem, weight_nk: Tensor) -> Solution:
    """The solution for all rows, here."""
    n, k = weight_nk.shape
    pieces = slabs(slice(0, n), k, on_gpu=weight_nk.is_cuda, size=problem.slab)
    return Solution.join([problem.solve(weight_nk[rows], rows) for rows in pieces])


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
