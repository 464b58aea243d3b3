"""RMS norms of a model that trains on a GPU as one kernel and a cast, forward and back, in the place of eight and twelve.

Under autocast the linears behind a norm read 16 bits. Here they are rounded once; otherwise each linear does it, keeps a copy
of its own for the way back, and hands back a gradient that is added up in float32. Norms that call their epsilon otherwise
(Gemma's) and layer norms are left as they are; so are those behind a branch, whose output joins the residual stream.
"""

import copy
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse_norms(model: nn.Module, columns: int, behind: Collection[str] = ()) -> int:
    """Let the norms of a residual stream of so many columns be torch's kernel where that agrees; returns how many.

    `behind` are the names, in a block, of norms that stand behind a branch.
    """
    count = 0
    for name, module in list(model.named_modules()):
        kind, weight = type(module), getattr(module, "weight", None)
        if not kind.__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.shape != (columns,):
            continue
        if name.rpartition(".")[2] not in behind and hasattr(module, "variance_epsilon") and _agrees(module, columns):
            module.__class__ = _fused(kind)  # type: ignore[arg-type]
            count += 1
    return count


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """The same norm, one kernel where a GPU computes in 16 bits what it reads."""

    class FusedNorm(kind):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            x, device = hidden_states, hidden_states.device.type
            if not torch.is_autocast_enabled(device):
                own: Tensor = super().forward(x)
                return own
            y = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.variance_epsilon)
            return y.to(torch.get_autocast_dtype(device))

    return FusedNorm


def _agrees(norm: nn.Module, columns: int) -> bool:
    """On random numbers, up to the order of sums."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, generator=generator).mul_(0.2).add_(1)
    x = torch.randn(16, columns, generator=generator).mul_(3)
    probe = copy.deepcopy(norm).to("cpu", torch.float32)
    probe.weight = nn.Parameter(weight, requires_grad=False)
    epsilon: Any = norm.variance_epsilon
    with torch.no_grad():
        return torch.allclose(probe(x), F.rms_norm(x, (columns,), weight, epsilon), rtol=1e-5, atol=1e-6)
