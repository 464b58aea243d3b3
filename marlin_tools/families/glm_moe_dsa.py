"""GLM 5: as DeepSeek V3.2, where each block chooses the tokens to attend to by itself."""

from dataclasses import replace

from marlin_tools.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, needs=("self_attn.indexer",), pairs=True)
