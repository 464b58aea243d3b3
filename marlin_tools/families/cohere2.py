"""Command R: both branches read the same norm of the same activations."""

from marlin_tools.families import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True),
        Branch(pre="input_layernorm", body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj", beside="always"),
    )
)
