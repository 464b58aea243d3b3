"""The modules of a model without its weights, and the checks under which a stored tensor becomes one of its weights."""

import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import ErrorTranslation, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


MAKING = threading.RLock()
"""Held while transformers makes modules or fills buffers: it changes torch's default type and functions for all threads."""
MISMATCH = "config.json and weights do not belong together; download the model again"


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype, *, eager: bool = False) -> "PreTrainedModel":
    """The model of config.json on the meta device: all modules, no weights. Of several models in one, the language model.

    `eager`: attention is computed in the plainest way, not as transformers likes best for the model.
    """
    model, nested = _whole(checkpoint, dtype, eager=eager)
    if nested:
        for owner in _owners(model):
            for name in [name for name, _ in owner.named_parameters(recurse=False)]:  # the end of a line of an image
                setattr(owner, name, None)
            for name, _ in _foreign(owner):
                setattr(owner, name, _Absent())
    return model.eval()


class _Absent(nn.Module):
    """What stands where a model sees or hears: some ask where that is even if there is nothing to see or hear."""

    device = torch.device("cpu")


def foreign_linears(checkpoint: Checkpoint) -> list[str]:
    """The linears of what reads images and sounds beside the language model, by the names of transformers' modules."""
    model, nested = _whole(checkpoint, torch.float16)
    if not nested:
        return []
    found = [(name if owner is model else f"model.{name}", part) for owner in _owners(model) for name, part in _foreign(owner)]
    return [
        f"{prefix}.{name}".rstrip(".")
        for prefix, part in found
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
    ]


_ON_THE_WAY = {"model", "language_model", "text_model", "lm_head"}
"""What modules between tokens and logits are called."""


def _owners(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the language model beside others: a model, and what it consists of besides its head."""
    inside = getattr(model, "model", None)
    return [model] if inside is None or hasattr(inside, "layers") else [model, inside]


def _foreign(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a module that are not on the way from tokens to logits."""
    return [(name, part) for name, part in owner.named_children() if name not in _ON_THE_WAY]


def _whole(checkpoint: Checkpoint, dtype: torch.dtype, *, eager: bool = False) -> tuple["PreTrainedModel", bool]:
    """The model of config.json without weights, and whether its language model is only a part of it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig

    what = f"`{checkpoint.path / 'config.json'}` is not understood by transformers"
    refused = ErrorTranslation(ModelError, what, "update transformers, or check config.json")
    with MAKING, refused, _without_warnings():
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        for each in (config, config.get_text_config()):  # it may keep a `text_config` that it does not know as plain values
            each.return_dict = True  # with false transformers' own models fail
        say_in_full(config)
        if isinstance(thinker := getattr(config, "thinker_config", None), PreTrainedConfig):
            config = thinker  # of a model that also speaks, what is worked on
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    nested = config.get_text_config() is not config
    maker = AutoModelForMultimodalLM if nested else AutoModelForCausalLM
    with MAKING, refused, torch.device("meta"), _without_warnings():
        eager = eager or bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))  # which nothing else caps
        how = "eager" if eager else None
        model: PreTrainedModel = maker.from_config(config, dtype=dtype, attn_implementation=how)
    return model, nested


def say_in_full(config: "PreTrainedConfig") -> None:
    """Say in the words of transformers 5.17 what it passes over, or misses, in a config.json of those who made the model.

    `rotary_dim` (MiniMax M2) is how much of a head is turned; without it all would be. The factor of a `longrope` follows from
    the lengths where it is left out (MiniCPM 3).
    """
    turns = getattr(config, "rope_parameters", None)
    if not isinstance(turns, dict):
        return
    if isinstance(size := getattr(config, "rotary_dim", None), int) and hasattr(config, "head_dim"):
        turns.setdefault("partial_rotary_factor", size / config.head_dim)
    if turns.get("rope_type") == "longrope" and (first := turns.get("original_max_position_embeddings")):
        turns.setdefault("factor", config.max_position_embeddings / first)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What transformers warns of in a config.json is either an error of ours or of no consequence here."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def read_weight(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> Tensor:
    """One stored tensor as it is; an error if its shape is not the one that config.json asks for, or if it is not finite."""
    stored = read_shaped(checkpoint, name, shape)
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise damaged(name)
    return stored


def read_shaped(checkpoint: Checkpoint, name: str, shape: Sequence[int], *, pinned: bool = False) -> Tensor:
    """One stored tensor as it is, if it has this shape; in pinned memory for a copy to a GPU."""
    if checkpoint.shape(name) != tuple(shape):
        raise mismatched(name, checkpoint.shape(name), shape)
    return checkpoint.read_pinned(name) if pinned else checkpoint.read(name)


def some(names: Sequence[str]) -> str:
    """The first of many names, for people."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def mismatched(name: str, found: Sequence[int], asked: Sequence[int]) -> ModelError:
    """What to raise for a weight of another shape."""
    return ModelError(
        f"`{name}` is {tuple(found)} in the checkpoint, config.json asks for {tuple(asked)}",
        hint=MISMATCH,
    )


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse a model with NaN or infinity in one of these tensors: those that are taken over as they are."""
    for name in names:
        if checkpoint.stored(name).dtype.is_floating_point and not bool(torch.isfinite(checkpoint.read(name)).all()):
            raise damaged(name)


def damaged(name: str) -> ModelError:
    """What to raise for a weight that is not finite."""
    return ModelError(f"`{name}` holds NaN or infinite values", hint="the checkpoint is damaged; download it again")
