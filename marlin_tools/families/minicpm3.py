"""MiniCPM 3: as Youtu, with a factor for what joins the residual stream, and one for the logits."""

from dataclasses import replace

from marlin_tools.families.youtu import FAMILY as YOUTU

FAMILY = replace(YOUTU, multiple="residual_scale", logits_over="logits_scaling")
