"""GLM 4 of the first kind: gate and up are one linear."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_up_proj",), exit="down_proj"),
    )
)
