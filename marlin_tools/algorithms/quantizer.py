"""What every algorithm that gives a weight codes and scales is asked: to make a group of linears ready to be solved."""

from abc import abstractmethod

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import ALONE, Hessian, Sharing
from marlin_tools.algorithms.pruning import MaskSolver
from marlin_tools.algorithms.solution import Problem, Solution, finite, solve_all
from marlin_tools.settings import Settings


class Quantizer(Settings):
    """Settings of an algorithm; `problem` is all that one has to write."""

    @abstractmethod
    def problem(
        self,
        name: str,
        hessian: Hessian | None,
        group_size: int,
        dtype: torch.dtype,
        mask_solver: MaskSolver | None = None,
        sharing: Sharing = ALONE,
    ) -> Problem:
        """What all rows of a group share; `dtype` is the model's own 16-bit type, `mask_solver` makes rows 2:4 on the way."""

    def solve(
        self,
        name: str,
        weight: Tensor,
        hessian: Hessian | None,
        group_size: int,
        dtype: torch.dtype,
        mask_solver: MaskSolver | None = None,
    ) -> Solution:
        """Quantise one weight [N, K], here and by itself."""
        return finite(name, solve_all(self.problem(name, hessian, group_size, dtype, mask_solver), weight))
