"""Command A with experts: both branches read the same norm of the same activations; the first blocks may have no experts."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

_EXPERTS = Branch(pre=ATTENTION.pre, body="mlp", experts=Experts(shared="shared_experts"))

FAMILY = Family(
    branches=(
        _EXPERTS,
        replace(_EXPERTS, experts=Experts(), instead=True),
        replace(MLP, pre=ATTENTION.pre, instead=True),
        replace(ATTENTION, beside="always"),
    ),
    logits_times="logit_scale",
)
