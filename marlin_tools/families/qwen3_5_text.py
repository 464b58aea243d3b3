"""Qwen 3.5: in most blocks a gated delta net stands in the place of attention; its small projections stay as they are."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

DELTA_NET = replace(ATTENTION, body="linear_attn", entry=("in_proj_qkv", "in_proj_z"), exit="out_proj", instead=True)

FAMILY = Family(branches=(ATTENTION, DELTA_NET, MLP))
