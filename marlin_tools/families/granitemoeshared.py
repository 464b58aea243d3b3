"""Granite with experts beside a shared one, of which gate and up are one linear."""

from dataclasses import replace

from marlin_tools.families.family import Branch
from marlin_tools.families.granitemoe import FAMILY as GRANITEMOE

SHARED = Branch(
    pre="post_attention_layernorm",
    body="shared_mlp",
    entry=("input_linear",),
    exit="output_linear",
    beside="always",
    optional=True,
)

FAMILY = replace(GRANITEMOE, branches=(*GRANITEMOE.branches, SHARED))
