"""GPT-NeoX and Pythia: q, k and v are one linear; the branches stand beside each other if config.json says so."""

from marlin_tools.families.family import Branch, Family

FAMILY = Family(
    branches=(
        Branch(pre="input_layernorm", body="attention", entry=("query_key_value",), exit="dense", attends=True),
        Branch(
            pre="post_attention_layernorm",
            body="mlp",
            entry=("dense_h_to_4h",),
            exit="dense_4h_to_h",
            beside="use_parallel_residual",
        ),
    ),
    decoder="gpt_neox",
    embedding="embed_in",
    norm="final_layer_norm",
    head="embed_out",
)
