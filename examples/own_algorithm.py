"""An algorithm of your own, tried on a whole model: here, scales that clip every group's largest weights by a tenth.

To try one, a name among the presets is enough; to keep it, give it a file in `marlin_tools/algorithms/` and a line there.
"""

from typing import Any

from torch import Tensor

import marlin_tools as mt
from marlin_tools.algorithms import PRESETS, RTN, Solution
from marlin_tools.algorithms.rtn import RTNProblem
from marlin_tools.algorithms.scales import absmax, encode


class ClippedProblem(RTNProblem):
    """What is known of a group of linears: group size, the model's type, and of algorithms that ask for it the Hessian."""

    def solve(self, weight_nk: Tensor, rows: slice) -> Solution:
        """`weight_nk` [outputs, inputs], of which these are some rows -> codes 0..15 and a scale for every group of inputs."""
        n, k = weight_nk.shape
        groups = weight_nk.float().view(n, k // self.group_size, self.group_size)
        scales = (0.9 * absmax(groups, self.dtype)).half().float()
        codes = encode(groups, scales[..., None]).view(n, k)
        return Solution.quantized(weight_nk.float(), weight_nk.float(), codes, scales, self.hessian, damp=None)


class Clipped(RTN):
    """The settings: what a recipe could say, and the problem that they make of a group."""

    def problem(self, *known: Any, **more: Any) -> ClippedProblem:
        return ClippedProblem(**vars(super().problem(*known, **more)))


PRESETS["clipped"] = Clipped()
for preset in ("rtn", "clipped"):
    model = mt.quantize("demo", None, mt.QuantizeSettings(preset=preset), f"runs/own-{preset}", overwrite=True)
    score = mt.evaluate(model, mt.EvaluateSettings(tasks=("ppl:demo",), limit=4), baseline="demo").score("ppl:demo", "kl")
    print(f"{preset:>8}: mean KL to the original {score.value:.4f}")
