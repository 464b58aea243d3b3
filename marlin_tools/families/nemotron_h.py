"""Nemotron-H: a block is Mamba, attention, or a feed-forward network without a gate, with experts or not; one of these."""

from marlin_tools.families.family import Branch, Experts, Family

FAMILY = Family(
    branches=(
        Branch(pre="norm", body="mixer", entry=("in_proj",), exit="out_proj", attends=True, apart=True),
        Branch(pre="norm", body="mixer", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True, instead=True),
        Branch(pre="norm", body="mixer", experts=Experts(shared="shared_experts", gated=False), instead=True),
        Branch(pre="norm", body="mixer", entry=("up_proj",), exit="down_proj", instead=True),
    ),
    embedding="embeddings",
    norm="norm_f",
    stored="backbone",
)
