"""Granite: as Llama, with a factor for what joins the residual stream, and one for the logits."""

from dataclasses import replace

from marlin_tools.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, multiple="residual_multiplier", logits_over="logits_scaling")
