"""Llama 4: experts beside a shared one, all of a block in one tensor; some blocks have none."""

from marlin_tools.families import Branch, Experts, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(
            pre="post_attention_layernorm",
            body="feed_forward",
            experts=Experts(shared="shared_expert", transposed=True),
        ),
        Branch(
            pre="post_attention_layernorm",
            body="feed_forward",
            entry=("gate_proj", "up_proj"),
            exit="down_proj",
            instead=True,
        ),
    )
)
