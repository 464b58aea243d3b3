"""Phi 1 to 2: both branches read the same LayerNorm, no gate, and a head with a bias."""

from dataclasses import replace

from marlin_tools.families.family import Branch, Family
from marlin_tools.families.llama import ATTENTION

FAMILY = Family(
    branches=(
        replace(ATTENTION, exit="dense"),
        Branch(pre="input_layernorm", body="mlp", entry=("fc1",), exit="fc2", beside="always"),
    ),
    norm="final_layernorm",
)
