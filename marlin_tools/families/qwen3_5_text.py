"""Qwen 3.5: in most blocks a gated delta net stands in the place of attention; its small projections stay as they are."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(
            pre="input_layernorm",
            body="linear_attn",
            entry=("in_proj_qkv", "in_proj_z"),
            exit="out_proj",
            attends=True,
            instead=True,
        ),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj"),
    )
)
