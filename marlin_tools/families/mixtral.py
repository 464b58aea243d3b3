"""Mixtral: every feed-forward network is a mixture of experts, which checkpoints store under names of their own."""

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION

NUMBERED = (
    (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
    (r"(experts\.\d+)\.down_proj", r"\1.w2"),
    (r"(experts\.\d+)\.up_proj", r"\1.w3"),
)

FAMILY = Family(
    branches=(ATTENTION, Branch(pre="post_attention_layernorm", body="mlp", experts=Experts())),
    renames=((r"^mlp\b", "block_sparse_moe"), *NUMBERED),
)
