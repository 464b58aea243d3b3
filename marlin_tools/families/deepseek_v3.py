"""DeepSeek V3: queries, keys and values come out of small latent vectors; experts beside a shared one."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

LATENT = (
    replace(ATTENTION, entry=("q_a_proj", "kv_a_proj_with_mqa"), inner=("q_b_proj", "kv_b_proj")),
    replace(ATTENTION, entry=("q_proj", "kv_a_proj_with_mqa"), inner=("kv_b_proj",), instead=True),
)

FAMILY = Family(
    branches=(
        *LATENT,
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_experts")),
        replace(MLP, instead=True),
    )
)
