"""Phi-3.5-MoE: as Mixtral, with another router."""

from dataclasses import replace

from marlin_tools.families.mixtral import FAMILY as MIXTRAL

FAMILY = replace(MIXTRAL, renames=((r"^mlp\.router\b", "mlp.gate"), *MIXTRAL.renames))
