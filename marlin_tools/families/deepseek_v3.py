"""DeepSeek V3: queries, keys and values come out of small latent vectors; experts beside a shared one."""

from marlin_tools.families import Branch, Experts, Family

FAMILY = Family(
    branches=(
        Branch(
            pre="input_layernorm",
            body="self_attn",
            entry=("q_a_proj", "kv_a_proj_with_mqa"),
            inner=("q_b_proj", "kv_b_proj"),
            exit="o_proj",
            attends=True,
        ),
        Branch(
            pre="input_layernorm",
            body="self_attn",
            entry=("q_proj", "kv_a_proj_with_mqa"),
            inner=("kv_b_proj",),
            exit="o_proj",
            attends=True,
            instead=True,
        ),
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_experts")),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj", instead=True),
    )
)
