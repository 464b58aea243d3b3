"""The language part of Qwen3-VL with experts: all of a block in one tensor, whichever way round; some blocks have none."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION, MLP

_EXPERTS = Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(transposed=None))

FAMILY = Family(branches=(ATTENTION, _EXPERTS, replace(MLP, instead=True)))
