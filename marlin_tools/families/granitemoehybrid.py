"""Granite 4: Mamba in the place of most attention or of none; experts beside a shared one, or that alone."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.granitemoe import FAMILY as GRANITEMOE
from marlin_tools.families.granitemoe import ROUTER
from marlin_tools.families.granitemoeshared import SHARED

_ATTENTION, _EXPERTS = GRANITEMOE.branches

MAMBA = replace(_ATTENTION, body="mamba", entry=("in_proj",), exit="out_proj", apart=True, instead=True)

FAMILY = Family(
    branches=(
        _ATTENTION,
        MAMBA,
        replace(_EXPERTS, optional=True),
        replace(SHARED, beside="num_local_experts", optional=False),
    ),
    renames=(ROUTER,),
    called=(("mamba", "mixer"),),
    multiple=GRANITEMOE.multiple,
    logits_over=GRANITEMOE.logits_over,
)
