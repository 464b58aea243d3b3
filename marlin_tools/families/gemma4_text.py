"""The dense models of Gemma 4: as Gemma 2, with a factor for the output of a block; some attention reads its keys as values."""

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
            pre="input_layernorm",
            body="self_attn",
            entry=("q_proj", "k_proj"),
            exit="o_proj",
            post="post_attention_layernorm",
            attends=True,
            instead=True,
        ),
        Branch(
            pre="pre_feedforward_layernorm",
            body="mlp",
            entry=("gate_proj", "up_proj"),
            exit="down_proj",
            post="post_feedforward_layernorm",
        ),
    ),
    scalar="layer_scalar",
    lacks=("per_layer_input_gate", "experts"),
)
