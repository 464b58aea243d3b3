"""VaultGemma: as Gemma 2, without the norms after the branches."""

from dataclasses import replace

from marlin_tools.families.family import Family
from marlin_tools.families.llama import ATTENTION, MLP

FAMILY = Family(branches=(ATTENTION, replace(MLP, pre="pre_feedforward_layernorm")))
