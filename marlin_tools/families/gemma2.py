"""Gemma 2 and the text part of Gemma 3: a second norm after each branch, before it joins the residual stream."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(
            pre="input_layernorm",
            body="self_attn",
            entry=("q_proj", "k_proj", "v_proj"),
            exit="o_proj",
            post="post_attention_layernorm",
            attends=True,
        ),
        Branch(
            pre="pre_feedforward_layernorm",
            body="mlp",
            entry=("gate_proj", "up_proj"),
            exit="down_proj",
            post="post_feedforward_layernorm",
        ),
    )
)
