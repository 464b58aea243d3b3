"""Granite 4 without Mamba and without experts: as Granite, with gate and up as one linear under names of their own."""

from dataclasses import replace

from marlin_tools.families import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(ATTENTION, replace(MLP, body="shared_mlp", entry=("input_linear",), exit="output_linear")),
    multiple="residual_multiplier",
    lacks=("mamba", "block_sparse_moe"),
)
