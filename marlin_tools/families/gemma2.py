"""Gemma 2 and the text part of Gemma 3: a second norm after each branch, before it joins the residual stream."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

BRANCHES = (
    replace(ATTENTION, post="post_attention_layernorm"),
    replace(MLP, pre="pre_feedforward_layernorm", post="post_feedforward_layernorm"),
)

FAMILY = Family(branches=BRANCHES)
