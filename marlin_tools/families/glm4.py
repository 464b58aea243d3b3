"""GLM 4: gate and up are one linear, and a second norm after each branch."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(
            pre="input_layernorm",
            body="self_attn",
            entry=("q_proj", "k_proj", "v_proj"),
            exit="o_proj",
            post="post_self_attn_layernorm",
            attends=True,
        ),
        Branch(
            pre="post_attention_layernorm",
            body="mlp",
            entry=("gate_up_proj",),
            exit="down_proj",
            post="post_mlp_layernorm",
        ),
    )
)
