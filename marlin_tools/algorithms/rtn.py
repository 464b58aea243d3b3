"""Round to nearest: the baseline that looks at no data. One scale per group by absmax, every weight to its nearest level."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import ALONE, Hessian, Sharing
from marlin_tools.algorithms.pruning import MaskSolver
from marlin_tools.algorithms.quantizer import Quantizer
from marlin_tools.algorithms.scales import absmax, encode
from marlin_tools.algorithms.solution import SLAB, Solution


class RTN(Quantizer):
    """Settings of round-to-nearest."""

    kind: Literal["rtn"] = "rtn"

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""
        return False

    @property
    def drift(self) -> float:
        """How much of the drift from the original model is corrected; above 0, the original model runs alongside."""
        return 0.0

    @property
    def guided(self) -> bool:
        """Whether rows make up for each other."""
        return False

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the quantised outputs of earlier ones."""
        return True

    def problem(
        self,
        name: str,
        hessian: Hessian | None,
        group_size: int,
        dtype: torch.dtype,
        mask_solver: MaskSolver | None = None,
        sharing: Sharing = ALONE,
    ) -> "RTNProblem":
        """What all rows of a group share; `dtype` is the model's own 16-bit type, `mask_solver` makes rows 2:4 first."""
        return RTNProblem(hessian, group_size, dtype, mask_solver)


@dataclass(frozen=True)
class RTNProblem:
    """Nothing is found out beforehand."""

    hessian: Hessian | None
    group_size: int
    dtype: torch.dtype
    mask_solver: MaskSolver | None
    slab: int = SLAB

    def solve(self, weight_nk: Tensor, rows: slice) -> Solution:
        """Each row on its own grid."""
        n, k = weight_nk.shape
        weight = weight_nk.float()
        aim = weight if self.mask_solver is None else self.mask_solver.place(weight, rows).value
        groups = aim.view(n, k // self.group_size, self.group_size)
        scales = absmax(groups, self.dtype)
        codes = encode(groups, scales[..., None]).view(n, k)
        return Solution.quantized(weight, weight, codes, scales, self.hessian, damp=None)
