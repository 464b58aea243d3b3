"""StarCoder 2: LayerNorms and biases, and no gate."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(pre="post_attention_layernorm", body="mlp", entry=("c_fc",), exit="c_proj"),
    )
)
