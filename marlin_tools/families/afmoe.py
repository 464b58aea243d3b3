"""Trinity: gated attention, a second norm after each branch, experts beside a shared one; the first blocks have none."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

_EXPERTS = Branch(pre="pre_mlp_layernorm", body="mlp", experts=Experts(shared="shared_experts"), post="post_mlp_layernorm")

FAMILY = Family(
    branches=(
        replace(ATTENTION, entry=("q_proj", "k_proj", "v_proj", "gate_proj"), post="post_attention_layernorm"),
        _EXPERTS,
        replace(MLP, pre=_EXPERTS.pre, post=_EXPERTS.post, instead=True),
    )
)
