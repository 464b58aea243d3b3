"""Jamba: the first Mamba in the place of most attention, whose small linears stay as they are; experts in some blocks."""

from dataclasses import replace

from marlin_tools.families.bamba import FAMILY as BAMBA
from marlin_tools.families.family import Branch, Experts, Family

_ATTENTION, _MAMBA, _MLP = BAMBA.branches

FAMILY = Family(
    branches=(
        _ATTENTION,
        _MAMBA,
        Branch(pre=_MLP.pre, body=_MLP.body, experts=Experts()),
        replace(_MLP, instead=True),
    ),
    norm=BAMBA.norm,
    plain="mamba",
)
