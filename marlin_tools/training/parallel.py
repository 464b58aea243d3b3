"""One process or many: `torchrun` starts them, FSDP2 gives each its share of the weights, gradients and optimiser state.

The same loop runs in both cases. A step is made of so many micro-batches; process r of n takes every n-th of them, starting at
r, and gradients are averaged. The first process alone writes and speaks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from marlin_tools.distributed.device import computing_on, own_device, processes
from marlin_tools.distributed.team import Team, joined

_PATIENCE = timedelta(hours=12)
"""For how long a process waits for the others; the first one may have much text to write."""


def shard(team: Team, decoder: nn.Module, blocks: nn.ModuleList) -> None:
    """Give every process its share of each block, and of the rest."""
    if team.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(team.device.type, (team.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh)


def put_back(team: Team, decoder: Any) -> None:
    """After a forward that no gradient follows: FSDP2 leaves what is in no block whole, for a gradient. What is written into
    the shares then is not seen, neither by the next forward nor by whoever reads the model's parameters.
    """
    if team.size > 1:
        decoder.reshard()


@contextmanager
def training_team(device: torch.device) -> Iterator[Team]:
    """The processes that `torchrun` started, or this one alone; `device` says whether each computes on a CPU or a GPU."""
    size = processes()
    if size == 1:
        with computing_on(device):
            yield Team(device=device)
        return
    device = own_device(device)
    with joined(device, _PATIENCE):
        yield Team(dist.get_rank(), size, device=device, goes_on="saved state")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share; then all processes have to ask for it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill_share(target: Tensor, full: Tensor) -> None:
    """Put a whole tensor into one of which this process may hold a share only."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements)
    target.copy_(full)
