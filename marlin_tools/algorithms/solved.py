"""What a solver returns: the quantised weight and how well it went."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.distributed.crew import Crew
from marlin_tools.ops.solver.products import rough_product
from marlin_tools.quantized import QuantizedLinear


@dataclass(frozen=True)
class Solved:
    """The result for one weight, or for several stacked ones.

    linear   the codes and scales
    lost     [N] squared output error of each row on the calibration activations; None without data
    energy   [N] squared output of each row; None without data
    weight_lost, weight_energy   the same for the weights themselves
    damp     the damping really used
    """

    linear: QuantizedLinear
    lost: Tensor | None
    energy: Tensor | None
    weight_lost: Tensor
    weight_energy: Tensor
    damp: float | None

    @property
    def output_error(self) -> float | None:
        """Squared output error relative to the squared output."""
        return None if self.lost is None or self.energy is None else _ratio(self.lost, self.energy)

    @property
    def weight_error(self) -> float:
        """Squared weight error relative to the squared weight."""
        return _ratio(self.weight_lost, self.weight_energy)

    @classmethod
    def join(cls, parts: Sequence["Solved"]) -> "Solved":
        """The results for some rows each, put under each other."""
        if len(parts) == 1:
            return parts[0]
        linears = [part.linear for part in parts]
        codes, scales = torch.cat([q.codes for q in linears]), torch.cat([q.scales for q in linears])
        lost = [part.lost for part in parts if part.lost is not None]
        energy = [part.energy for part in parts if part.energy is not None]
        return cls(
            QuantizedLinear(codes, scales, linears[0].group_size),
            torch.cat(lost) if lost else None,
            torch.cat(energy) if energy else None,
            torch.cat([part.weight_lost for part in parts]),
            torch.cat([part.weight_energy for part in parts]),
            parts[0].damp,
        )

    def gathered(self, crew: Crew, n: int) -> "Solved":
        """The result for all `n` rows, of which this one is for the crew member's own."""
        q = self.linear
        return Solved(
            QuantizedLinear(crew.gather(q.codes, n), crew.gather(q.scales, n), q.group_size),
            None if self.lost is None else crew.gather(self.lost, n),
            None if self.energy is None else crew.gather(self.energy, n),
            crew.gather(self.weight_lost, n),
            crew.gather(self.weight_energy, n),
            self.damp,
        )

    def split(self, rows: Sequence[int]) -> list["Solved"]:
        """Take a solve of stacked weights apart again."""
        results, start = [], 0
        for count in rows:
            part = slice(start, start + count)
            linear = QuantizedLinear(self.linear.codes[part], self.linear.scales[part], self.linear.group_size)
            lost, energy = (None, None) if self.lost is None or self.energy is None else (self.lost[part], self.energy[part])
            results.append(Solved(linear, lost, energy, self.weight_lost[part], self.weight_energy[part], self.damp))
            start += count
        return results


@dataclass(frozen=True)
class Errors:
    """What a new weight loses, row by row [N]; see `Solved`."""

    lost: Tensor | None
    energy: Tensor | None
    weight_lost: Tensor
    weight_energy: Tensor

    @classmethod
    def join(cls, parts: Sequence["Errors"]) -> "Errors":
        """Those of some rows each, put under each other."""
        lost = [part.lost for part in parts if part.lost is not None]
        energy = [part.energy for part in parts if part.energy is not None]
        return cls(
            torch.cat(lost) if lost else None,
            torch.cat(energy) if energy else None,
            torch.cat([part.weight_lost for part in parts]),
            torch.cat([part.weight_energy for part in parts]),
        )

    def of(self, rows: slice) -> tuple[float | None, float]:
        """(squared output error relative to the squared output, the same of the weights) of some rows."""
        output = None if self.lost is None or self.energy is None else _ratio(self.lost[rows], self.energy[rows])
        return output, _ratio(self.weight_lost[rows], self.weight_energy[rows])


def errors_of(weight_nk: Tensor, target_nk: Tensor, value_nk: Tensor, hessian: Hessian | None) -> Errors:
    """What is lost between `value` and the weight that the solver aimed at, relative to the original weight."""
    lost = energy = None
    if hessian is not None:
        error_nk = target_nk - value_nk
        lost = (rough_product(error_nk, hessian.matrix) * error_nk).sum(dim=1, dtype=torch.float64)
        energy = (rough_product(weight_nk, hessian.matrix) * weight_nk).sum(dim=1, dtype=torch.float64)
    weight_lost = (weight_nk - value_nk).square().sum(dim=1, dtype=torch.float64)
    return Errors(lost, energy, weight_lost, weight_nk.square().sum(dim=1, dtype=torch.float64))


def as_solved(
    weight_nk: Tensor, target_nk: Tensor, codes_nk: Tensor, scales_ng: Tensor, hessian: Hessian | None, damp: float | None
) -> Solved:
    """Wrap float codes and scales into the neutral type; outputs are measured against the weight that the solver aimed at."""
    group_size = weight_nk.shape[1] // scales_ng.shape[1]
    linear = QuantizedLinear(codes_nk.to(torch.uint8), scales_ng.to(torch.float16), group_size)
    errors = errors_of(weight_nk, target_nk, linear.dequantize(), hessian)
    return Solved(linear, errors.lost, errors.energy, errors.weight_lost, errors.weight_energy, damp)


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else 0.0
