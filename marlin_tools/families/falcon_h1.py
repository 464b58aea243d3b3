"""Falcon-H1: Mamba and attention beside each other in every block, with factors for what they read and put out."""

from dataclasses import replace

from marlin_tools.families.bamba import FAMILY as BAMBA
from marlin_tools.families.family import Family

_ATTENTION, _MAMBA, _MLP = BAMBA.branches

FAMILY = Family(
    branches=(
        replace(_MAMBA, out="ssm_out_multiplier", instead=False),
        replace(_ATTENTION, into="attention_in_multiplier", out="attn_out_multiplier", beside="always"),
        _MLP,
    ),
    norm=BAMBA.norm,
    logits_times="lm_head_multiplier",
    called=(*BAMBA.called, ("self_attn", "")),
    lacks=("feed_forward.down_proj.bias",),
    pairs=True,
)
