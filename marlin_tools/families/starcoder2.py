"""StarCoder 2: LayerNorms and biases, and no gate."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(branches=(ATTENTION, replace(MLP, entry=("c_fc",), exit="c_proj")))
