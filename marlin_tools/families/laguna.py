"""Laguna: experts beside a shared one, the first blocks have none; what gates its attention stays as it is."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(
        ATTENTION,
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_experts")),
        replace(MLP, instead=True),
    ),
    renames=(
        (r"^mlp\.gate\.e_score_correction_bias\b", "mlp.experts.e_score_correction_bias"),
        (r"^mlp\.shared_experts\b", "mlp.shared_expert"),
    ),
)
