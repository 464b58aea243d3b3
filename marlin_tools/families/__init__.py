"""Model families as pure data: where the blocks are, and which linears read the same tensor.

A decoder block is a chain of residual branches, each `h + post(exit(body(pre(h))))`. The `entry` linears read `pre(h)`; `body`
is the module that holds them and, up to but not including `exit`, turns `pre(h)` into what `exit` reads. That is all the stream
needs to stage a block; attention, rotary embeddings, masks, q/k norms and embedding scales stay in transformers' own modules.

One file per family, named by the `model_type` of config.json; `ALIASES` names types that are built the same way.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from marlin_tools.errors import ModelError


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block; all names are relative to the block."""

    pre: str
    body: str
    entry: tuple[str, ...]
    exit: str
    post: str | None = None
    attends: bool = False


@dataclass(frozen=True)
class Family:
    """How a kind of model is built. `decoder` is the module that maps token ids to hidden states."""

    branches: tuple[Branch, ...]
    decoder: str = "model"
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that can be quantised, in solving order, relative to the block."""
        return tuple(f"{b.body}.{name}" for b in self.branches for name in (*b.entry, b.exit))

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors start with."""
        return f"{self.decoder}.{self.blocks}.{index}."


ALIASES = {"mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma": "llama", "gemma3_text": "gemma2"}
FAMILIES = ("llama", "gemma2")

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def find_family(config: dict[str, Any]) -> Family:
    """The family of a config.json, or a refusal that says why."""
    model_type = config.get("model_type")
    known = ", ".join(sorted({*FAMILIES, *ALIASES}))
    if any(config.get(key) for key in _EXPERTS):
        key = next(key for key in _EXPERTS if config.get(key))
        raise ModelError(
            f"model type `{model_type}` is a mixture of experts ({key} = {config[key]})", hint=f"dense models only: {known}"
        )
    name = ALIASES.get(str(model_type), str(model_type))
    if name not in FAMILIES:
        raise ModelError(f"unknown model type `{model_type}`", hint=f"known: {known}")
    family: Family = importlib.import_module(f"marlin_tools.families.{name}").FAMILY
    return family


def known_family(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None where `find_family` refuses."""
    try:
        return find_family(config)
    except ModelError:
        return None
