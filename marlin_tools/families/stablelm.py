"""StableLM: LayerNorms; in the larger ones the branches stand beside each other and read the same norm."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(branches=(ATTENTION, replace(MLP, beside="use_parallel_residual")))
