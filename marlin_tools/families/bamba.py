"""Bamba: Mamba in the place of most attention."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.granitemoehybrid import FAMILY as GRANITE4
from marlin_tools.families.granitemoehybrid import MAMBA
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(
    branches=(ATTENTION, MAMBA, replace(MLP, pre="pre_ff_layernorm", body="feed_forward")),
    norm="final_layernorm",
    called=GRANITE4.called,
    pairs=True,
)
