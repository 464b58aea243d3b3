"""Qwen 2 and 3 with experts, and what is built like them: with a shared expert or without, some blocks without any."""

from marlin_tools.families import Branch, Experts, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(
            pre="input_layernorm",
            body="linear_attn",
            entry=("in_proj_qkvz",),
            exit="out_proj",
            attends=True,
            instead=True,
        ),
        Branch(
            pre="input_layernorm",
            body="linear_attn",
            entry=("in_proj_qkv", "in_proj_z"),
            exit="out_proj",
            attends=True,
            instead=True,
        ),
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_expert")),
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_experts"), instead=True),
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(), instead=True),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj", instead=True),
    )
)
