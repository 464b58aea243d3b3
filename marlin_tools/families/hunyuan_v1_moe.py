"""Hunyuan with experts: beside a shared one in every block."""

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.llama import ATTENTION

FAMILY = Family(branches=(ATTENTION, Branch(pre="post_attention_layernorm", body="mlp", experts=Experts(shared="shared_mlp"))))
