"""LFM2 with experts: as LFM2, under names of the tensors as Mixtral's; the first blocks have none."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts
from marlin_tools.families.lfm2 import FAMILY as LFM2
from marlin_tools.families.mixtral import NUMBERED

_ATTENTION, _CONVOLUTION, _MLP = LFM2.branches

FAMILY = replace(
    LFM2,
    branches=(
        _ATTENTION,
        _CONVOLUTION,
        Branch(pre=_MLP.pre, body=_MLP.body, experts=Experts()),
        replace(_MLP, instead=True),
    ),
    renames=NUMBERED,
)
