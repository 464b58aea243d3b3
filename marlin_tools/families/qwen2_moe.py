"""Qwen 2 and 3 with experts, and what is built like them: with a shared expert or without, some blocks without any."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP
from marlin_tools.families.qwen3_5_text import DELTA_NET

_EXPERTS = Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_expert"))

FAMILY = Family(
    branches=(
        ATTENTION,
        replace(DELTA_NET, entry=("in_proj_qkvz",)),
        DELTA_NET,
        _EXPERTS,
        replace(_EXPERTS, experts=Experts(shared="shared_experts"), instead=True),
        replace(_EXPERTS, experts=Experts(), instead=True),
        replace(MLP, instead=True),
    )
)
