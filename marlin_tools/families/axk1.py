"""A.X K1: as DeepSeek V3, with a norm after the experts."""

from dataclasses import replace

from marlin_tools.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, renames=((r"^mlp\.post_mlp_layernorm\b", "post_mlp_layernorm"),))
