"""EXAONE with experts: as Qwen's, with what corrects the router stored beside it."""

from dataclasses import replace

from marlin_tools.families.qwen2_moe import FAMILY as QWEN2_MOE

FAMILY = replace(QWEN2_MOE, renames=((r"^mlp\.gate\.e_score_correction_bias\b", "mlp.e_score_correction_bias"),))
