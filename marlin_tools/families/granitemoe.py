"""Granite with experts: as Mixtral, all of a block in one tensor, with a factor for what joins the residual stream."""

from marlin_tools.families import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION

_TOGETHER = ("input_linear.weight", "output_linear.weight")

FAMILY = Family(
    branches=(
        ATTENTION,
        Branch(pre="post_attention_layernorm", body="block_sparse_moe", experts=Experts(together=_TOGETHER)),
    ),
    renames=(
        (r"^block_sparse_moe\.router\b", "block_sparse_moe.router.layer"),
        (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
        (r"(experts\.\d+)\.down_proj", r"\1.w2"),
        (r"(experts\.\d+)\.up_proj", r"\1.w3"),
    ),
    multiple="residual_multiplier",
)
