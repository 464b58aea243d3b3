"""FlexOlmo: norms after the branches, as in OLMo 2, and experts."""

from marlin_tools.families.family import Branch, Experts, Family
from marlin_tools.families.olmo2 import FAMILY as OLMO2

FAMILY = Family(
    branches=(OLMO2.branches[0], Branch(pre=None, body="mlp", experts=Experts(), post="post_feedforward_layernorm"))
)
