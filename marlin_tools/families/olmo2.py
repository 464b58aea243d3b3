"""OLMo 2 and 3, EXAONE 4: no norm before a branch, one after it."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(
            pre=None,
            body="self_attn",
            entry=("q_proj", "k_proj", "v_proj"),
            exit="o_proj",
            post="post_attention_layernorm",
            attends=True,
        ),
        Branch(pre=None, body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj", post="post_feedforward_layernorm"),
    )
)
