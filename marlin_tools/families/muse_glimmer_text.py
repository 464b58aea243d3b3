"""The language part of Muse Glimmer: gated attention, and a second norm after each branch."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.gemma2 import BRANCHES

_ATTENTION, _MLP = BRANCHES

FAMILY = Family(
    branches=(replace(_ATTENTION, entry=("q_proj", "k_proj", "v_proj", "gate_proj")), _MLP),
    logits_times="output_multiplier",
)
