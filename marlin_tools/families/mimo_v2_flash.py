"""MiMo V2 Flash: as Qwen with experts, with sinks in the attention that sees a window, stored under a name of their own."""

from dataclasses import replace

from marlin_tools.families.qwen2_moe import FAMILY as QWEN2_MOE

FAMILY = replace(QWEN2_MOE, renames=((r"^self_attn\.sinks\b", "self_attn.attention_sink_bias"),))
