"""Granite: as Llama, with a factor for what joins the residual stream."""

from dataclasses import replace

from marlin_tools.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, multiple="residual_multiplier")
