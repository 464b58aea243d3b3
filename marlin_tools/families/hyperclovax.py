"""HyperCLOVA X: as Granite, with norms after the branches if config.json says so; its logits are multiplied, not divided."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(replace(ATTENTION, post="post_norm1"), replace(MLP, post="post_norm2")),
    multiple="residual_multiplier",
    logits_times="logits_scaling",
)
