"""StableLM: LayerNorms; in the larger ones the branches stand beside each other and read the same norm."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(
            pre="post_attention_layernorm",
            body="mlp",
            entry=("gate_proj", "up_proj"),
            exit="down_proj",
            beside="use_parallel_residual",
        ),
    )
)
