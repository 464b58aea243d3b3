"""How modules without weights get those of a checkpoint, and what they ask for."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import MAKING
from marlin_tools.families.layout import WeightRef
from marlin_tools.stream.read_ahead import WeightRequest, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def materialize(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a meta module its weights from the checkpoint, in place."""
    asked = {name: WeightRequest(WeightRef(prefix + name), parameter.shape) for name, parameter in module.named_parameters()}
    if asked:
        fill(module, read_weights(checkpoint, asked, device, dtype))


def fill(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make these tensors the weights, and the stored buffers, of a module."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        home = module.get_submodule(owner)
        setattr(home, leaf, weight if leaf in home._buffers else nn.Parameter(weight, requires_grad=False))  # noqa: SLF001


def compute_buffers(decoder: "PreTrainedModel", block: nn.Module, device: torch.device) -> None:
    """Let transformers compute the buffers of a block that no checkpoint stores, if a model of this type has such."""
    waiting = [(owner, name) for owner in block.modules() for name, each in owner.named_buffers(recurse=False) if each.is_meta]
    for owner, name in waiting:
        setattr(owner, name, torch.full_like(getattr(owner, name), torch.nan, device=device))
    if waiting:
        with MAKING:
            decoder._init_weights(decoder)  # noqa: SLF001 (transformers' protocol)


def weights_of(module: nn.Module, dtype: torch.dtype) -> dict[str, tuple[torch.Size, bool]]:
    """Shapes of all that is stored of a module, and whether it takes the type to compute in: buffers, some routers do not."""
    computed = {name for name, parameter in module.named_parameters() if parameter.dtype == dtype}
    return {name: (tensor.shape, name in computed) for name, tensor in module.state_dict(keep_vars=True).items()}
