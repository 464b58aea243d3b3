"""What a solver returns: the quantised weight and how well it went."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Hessian
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


def as_solved(
    weight_nk: Tensor, target_nk: Tensor, codes_nk: Tensor, scales_ng: Tensor, hessian: Hessian | None, damp: float | None
) -> Solved:
    """Wrap float codes and scales into the neutral type; outputs are measured against the weight that the solver aimed at."""
    group_size = weight_nk.shape[1] // scales_ng.shape[1]
    linear = QuantizedLinear(codes_nk.to(torch.uint8), scales_ng.to(torch.float16), group_size)
    value_nk = linear.dequantize()
    lost = energy = None
    if hessian is not None:
        error_nk = target_nk - value_nk
        lost = ((error_nk @ hessian.matrix) * error_nk).sum(dim=1, dtype=torch.float64)
        energy = ((weight_nk @ hessian.matrix) * weight_nk).sum(dim=1, dtype=torch.float64)
    weight_lost = (weight_nk - value_nk).square().sum(dim=1, dtype=torch.float64)
    return Solved(linear, lost, energy, weight_lost, weight_nk.square().sum(dim=1, dtype=torch.float64), damp)


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else 0.0
