"""The modules of a model without its weights, and the checks under which a stored tensor becomes one of its weights."""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import ModelError, Translated

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of config.json on the meta device: all modules, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    what = f"`{checkpoint.path / 'config.json'}` is not understood by transformers"
    refused = Translated(ModelError, what, "update transformers, or check config.json")
    with refused:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with refused, torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def read_weight(checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> Tensor:
    """One stored tensor as it is; an error if its shape is not the one that config.json asks for, or if it is not finite."""
    stored = read_shaped(checkpoint, name, shape)
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise damaged(name)
    return stored


def read_shaped(checkpoint: Checkpoint, name: str, shape: Sequence[int], *, pinned: bool = False) -> Tensor:
    """One stored tensor as it is, if it has this shape; in pinned memory for a copy to a GPU."""
    if checkpoint.shape(name) != tuple(shape):
        raise ModelError(
            f"`{name}` is {checkpoint.shape(name)} in the checkpoint, config.json asks for {tuple(shape)}",
            hint="config.json and weights do not belong together; download the model again",
        )
    return checkpoint.read_pinned(name) if pinned else checkpoint.read(name)


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse a model with NaN or infinity in one of these tensors: those that are taken over as they are."""
    for name in names:
        if checkpoint.stored(name).dtype.is_floating_point and not bool(torch.isfinite(checkpoint.read(name)).all()):
            raise damaged(name)


def damaged(name: str) -> ModelError:
    """What to raise for a weight that is not finite."""
    return ModelError(f"`{name}` holds NaN or infinite values", hint="the checkpoint is damaged; download it again")
