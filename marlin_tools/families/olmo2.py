"""OLMo 2 and 3, EXAONE 4: no norm before a branch, one after it."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.gemma2 import BRANCHES

FAMILY = Family(branches=tuple(replace(branch, pre=None) for branch in BRANCHES))
