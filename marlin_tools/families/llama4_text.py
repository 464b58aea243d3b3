"""Llama 4: experts beside a shared one, all of a block in one tensor; some blocks have none."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

_EXPERTS = Experts(shared="shared_expert", transposed=True)

FAMILY = Family(
    branches=(
        ATTENTION,
        Branch(pre="post_attention_layernorm", body="feed_forward", experts=_EXPERTS),
        replace(MLP, body="feed_forward", instead=True),
    )
)
