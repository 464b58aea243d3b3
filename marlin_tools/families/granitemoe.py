"""Granite with experts: as Mixtral, all of a block in one tensor, with the factors of Granite."""

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION
from marlin_tools.families.mixtral import NUMBERED

ROUTER = (r"^block_sparse_moe\.router\b", "block_sparse_moe.router.layer")

_TOGETHER = ("input_linear.weight", "output_linear.weight")

FAMILY = Family(
    branches=(
        ATTENTION,
        Branch(pre="post_attention_layernorm", body="block_sparse_moe", experts=Experts(together=_TOGETHER)),
    ),
    renames=(ROUTER, *NUMBERED),
    multiple="residual_multiplier",
    logits_over="logits_scaling",
)
