"""GPT-OSS: attention with sinks, experts with biases, all of a block in one tensor with gate and up in turns."""

from marlin_tools.families import Branch, Experts, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(transposed=True, interleaved=True)),
    )
)
