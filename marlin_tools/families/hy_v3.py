"""Hunyuan 3: as Qwen with experts, under names of its own."""

from dataclasses import replace

from marlin_tools.families.qwen2_moe import FAMILY as QWEN2_MOE

FAMILY = replace(
    QWEN2_MOE,
    renames=(
        (r"^mlp\.gate\b", "mlp.router.gate"),
        (r"^mlp\.e_score_correction_bias\b", "mlp.expert_bias"),
        (r"^mlp\.shared_experts\b", "mlp.shared_mlp"),
    ),
)
