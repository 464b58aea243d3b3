"""The dense models of Gemma 4: as Gemma 2, with a factor for the output of a block; some attention reads its keys as values."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.gemma2 import BRANCHES

_ATTENTION, _MLP = BRANCHES

FAMILY = Family(
    branches=(_ATTENTION, replace(_ATTENTION, entry=("q_proj", "k_proj"), instead=True), _MLP),
    scalar="layer_scalar",
    lacks=("per_layer_input_gate", "experts"),
    unset=("num_kv_shared_layers",),
)
