"""Phi 3 and 4: q, k and v are one linear, gate and up as well."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(branches=(replace(ATTENTION, entry=("qkv_proj",)), replace(MLP, entry=("gate_up_proj",))))
