"""LFM2 with experts: as LFM2, under names of the tensors as Mixtral's; the first blocks have none."""

from dataclasses import replace

from marlin_tools.families import Branch, Experts
from marlin_tools.families.lfm2 import FAMILY as LFM2

_ATTENTION, _CONVOLUTION, _MLP = LFM2.branches

FAMILY = replace(
    LFM2,
    branches=(
        _ATTENTION,
        _CONVOLUTION,
        Branch(pre=_MLP.pre, body=_MLP.body, experts=Experts()),
        replace(_MLP, instead=True),
    ),
    renames=(
        (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
        (r"(experts\.\d+)\.down_proj", r"\1.w2"),
        (r"(experts\.\d+)\.up_proj", r"\1.w3"),
    ),
)
