"""GPT-OSS: attention with sinks, experts with biases, all of a block in one tensor with gate and up in turns."""

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION

EXPERTS = Experts(transposed=True, interleaved=True)

FAMILY = Family(branches=(ATTENTION, Branch(pre="post_attention_layernorm", body="mlp", experts=EXPERTS)))
