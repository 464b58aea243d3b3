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


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of config.json on the meta device: all modules, no weights. Of several models in one, the language model."""
    model, nested = _whole(checkpoint, dtype)
    if nested:
        for owner in _owners(model):
            loose = [name for name, _ in owner.named_parameters(recurse=False)]  # what marks the end of a line of an image
            for name in (*loose, *(name for name, _ in _foreign(owner))):
                setattr(owner, name, None)
        if model.config.model_type == "qwen2_audio":
            model.model.audio_tower = _Deaf()
    return model.eval()


class _Deaf(nn.Module):
    """What stands where Qwen2-Audio hears: it is asked where it is even if there is nothing to hear."""

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


def _whole(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple["PreTrainedModel", bool]:
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
        # eagerly where nothing else caps the logits of attention, or keeps PaliGemma, which may look ahead in what it is asked,
        # from doing so in any text; else as transformers likes best for the model
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        how = "eager" if capped or config.model_type == "paligemma" else None
        model: PreTrainedModel = maker.from_config(config, dtype=dtype, attn_implementation=how)
    return model, nested


def say_in_full(config: "PreTrainedConfig") -> None:
    """Say in the words of transformers 5.17 what it passes over, or misses, in a config.json of those who made the model.

    MiniMax M2 says with `rotary_dim` how much of a head is turned; without it all would be. MiniCPM 3 leaves the factor of its
    `longrope` to those who read the lengths, as other types may.
    """
    size, turns = getattr(config, "rotary_dim", None), getattr(config, "rope_parameters", None)
    if config.model_type == "minimax_m2" and isinstance(size, int) and isinstance(turns, dict):
        turns.setdefault("partial_rotary_factor", size / config.head_dim)
    if config.model_type == "minicpm3" and isinstance(turns, dict) and turns.get("rope_type") == "longrope":
        turns.setdefault("factor", config.max_position_embeddings / turns["original_max_position_embeddings"])


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
