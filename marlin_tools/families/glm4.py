"""GLM 4: gate and up are one linear, and a second norm after each branch."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(
        replace(ATTENTION, post="post_self_attn_layernorm"),
        replace(MLP, entry=("gate_up_proj",), post="post_mlp_layernorm"),
    )
)
