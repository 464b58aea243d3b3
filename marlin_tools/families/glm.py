"""GLM 4 of the first kind: gate and up are one linear."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(branches=(ATTENTION, replace(MLP, entry=("gate_up_proj",))))
