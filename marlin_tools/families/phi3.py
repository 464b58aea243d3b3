"""Phi 3 and 4: q, k and v are one linear, gate and up as well."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("qkv_proj",), exit="o_proj", attends=True),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_up_proj",), exit="down_proj"),
    )
)
