"""Apertus: norms of other names, and no gate; how its activation bends is learned."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(
        replace(ATTENTION, pre="attention_layernorm"),
        replace(MLP, pre="feedforward_layernorm", entry=("up_proj",)),
    )
)
