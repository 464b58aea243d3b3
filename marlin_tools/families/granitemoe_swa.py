"""Granite with experts beside a shared one, some blocks of which see a window: as the others, under newer names."""

from dataclasses import replace

from marlin_tools.families.family import Experts
from marlin_tools.families.granitemoeshared import FAMILY as GRANITEMOESHARED
from marlin_tools.families.mixtral import NUMBERED

_ATTENTION, _EXPERTS, _SHARED = GRANITEMOESHARED.branches

FAMILY = replace(
    GRANITEMOESHARED,
    branches=(_ATTENTION, replace(_EXPERTS, experts=Experts()), _SHARED),
    renames=NUMBERED,
)
