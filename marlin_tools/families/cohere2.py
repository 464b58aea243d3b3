"""Command R: both branches read the same norm of the same activations."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(ATTENTION, replace(MLP, pre=ATTENTION.pre, beside="always")),
    logits_times="logit_scale",
)
