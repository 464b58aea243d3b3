"""Youtu: latent vectors as in DeepSeek, without experts."""

from marlin_tools.families.deepseek_v3 import LATENT
from marlin_tools.families.family import Family
from marlin_tools.families.llama import MLP

FAMILY = Family(branches=(*LATENT, MLP))
