"""LFM2: in most blocks a short convolution stands in the place of attention; of it, the linears around it are quantised."""

from marlin_tools.families.family import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="operator_norm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="out_proj", attends=True),
        Branch(pre="operator_norm", body="conv", entry=("in_proj",), exit="out_proj", attends=True, instead=True),
        Branch(pre="ffn_norm", body="feed_forward", entry=("w1", "w3"), exit="w2"),
    ),
    norm="embedding_norm",
)
