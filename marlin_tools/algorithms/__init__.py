"""Solvers: (weight, Hessian) -> codes and scales. One file per algorithm, one line in `PRESETS`.

These are the settings that people ask for by name.
"""

from typing import Annotated

from pydantic import Field

from marlin_tools.algorithms.gptq import GPTQ
from marlin_tools.algorithms.hessian import Gram, Hessian
from marlin_tools.algorithms.pruning import PRUNERS, MaskSolver, Pruner
from marlin_tools.algorithms.rtn import RTN
from marlin_tools.algorithms.solution import Problem, Solution
from marlin_tools.settings import one_of

Algorithm = Annotated[RTN | GPTQ, Field(discriminator="kind")]

PRESETS: dict[str, RTN | GPTQ] = {
    "rtn": RTN(),
    "marlin": GPTQ(damp=0.1, noise=0, order="natural", scales="conditional", signed=False, polish=0, sequential=False, drift=0),
    "fast": GPTQ(polish=0, drift=0),
    "default": GPTQ(),
    "max": GPTQ(drift=0.75, guided=True),  # and each block is tuned afterwards, see `compress/quantize.py`
}

Preset = Annotated[str, one_of("preset", PRESETS)]
"""What a setting that names one of them holds."""

PRUNER_OF = {"rtn": "magnitude", "marlin": "sparsegpt", "fast": "default", "default": "default", "max": "max"}
"""Which of `PRUNERS` finds the mask when a preset is to make a dense model 2:4 on the way."""

__all__ = [
    "GPTQ",
    "PRESETS",
    "PRUNERS",
    "PRUNER_OF",
    "RTN",
    "Algorithm",
    "Gram",
    "Hessian",
    "MaskSolver",
    "Preset",
    "Problem",
    "Pruner",
    "Solution",
]
