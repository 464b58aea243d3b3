"""Round to nearest: the baseline that looks at no data. One scale per group by absmax, every weight to its nearest level."""

from typing import Literal

import torch
from torch import Tensor

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.algorithms.pruning import Placing
from marlin_tools.algorithms.scales import absmax, encode
from marlin_tools.algorithms.solved import Solved, as_solved
from marlin_tools.distributed.crew import ALONE, Crew
from marlin_tools.settings import Settings


class RTN(Settings):
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
    def staged(self) -> bool:
        """Whether later groups of a block see the quantised outputs of earlier ones."""
        return True

    def solve(
        self,
        name: str,
        weight: Tensor,
        hessian: Hessian | None,
        group_size: int,
        dtype: torch.dtype,
        placing: Placing | None = None,
        crew: Crew = ALONE,
    ) -> Solved:
        """Quantise one weight [N, K]; `dtype` is the model's own 16-bit type, `placing` makes its rows 2:4 first.

        There is too little to do to share it in a crew.
        """
        n, k = weight.shape
        weight = weight.float()
        groups = (weight if placing is None else placing.place(weight).value).view(n, k // group_size, group_size)
        scales = absmax(groups, dtype)
        codes = encode(groups, scales[..., None]).view(n, k)
        return as_solved(weight, weight, codes, scales, hessian, damp=None)
