"""A linear layer whose parameter is the kept half of a 2:4 weight.

    values     [N, K/2]  the two kept weights of every quad, in the order of their columns; what the optimiser sees
    positions  uint8 [N, K/4]  where in its quad they stand: first + 4 · second, first < second; never changes. A quad that
                               keeps fewer than two has 16 (first) or 32 (second) added where its value must stay zero.

The weight [N, K] exists only while it multiplies. What was pruned is no parameter, so no step, decay or rounding can bring it
back, and gradients, optimiser state and everything that processes exchange have half the size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DEAD = (16, 32)

_SMALLEST = 2.0**-24
"""The smallest number of float16, and one that other types have."""


def positions_of(mask_nk: Tensor) -> Tensor:
    """The positions that a 2:4 mask keeps."""
    n, k = mask_nk.shape
    kept = mask_nk.view(n, k // 4, 4)
    if bool((kept.sum(dim=2) > 2).any()):
        raise ValueError("the mask keeps more than two of a quad")
    pair = torch.argsort(kept.int(), dim=2, descending=True, stable=True)[:, :, :2].sort(dim=2).values
    dead = ~kept.gather(2, pair)
    places = pair[:, :, 0] + 4 * pair[:, :, 1] + _DEAD[0] * dead[:, :, 0] + _DEAD[1] * dead[:, :, 1]
    return places.to(torch.uint8)


def compress(weight_nk: Tensor, positions: Tensor) -> Tensor:
    """The values [N, K/2] at the positions."""
    n, k = weight_nk.shape
    columns, dead = _places(positions)
    return weight_nk.reshape(n, k // 4, 4).gather(2, columns).masked_fill_(dead, 0).view(n, k // 2)


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """The weight [N, K] with the values in their places and zeros elsewhere."""
    n, half = values.shape
    columns, dead = _places(positions)
    quads = torch.zeros(n, half // 2, 4, dtype=values.dtype, device=values.device)
    return quads.scatter_(2, columns, values.reshape(n, half // 2, 2).masked_fill(dead, 0)).view(n, 2 * half)


def _places(positions: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K/4, 2] each: the columns of a quad as gather and scatter want them, and which of the two must stay zero."""
    first = torch.stack((positions, positions >> 2), dim=2)
    dead = torch.stack((positions & _DEAD[0], positions & _DEAD[1]), dim=2)
    return first.bitwise_and_(3).long(), dead.bool()


def with_mask_of(old: Tensor, trained: Tensor) -> Tensor:
    """The trained weight in the type of the old one and zero exactly where that is; nothing else rounds to zero.

    A mask can then be read off the zeros of a checkpoint, before and after.
    """
    new = trained.to(old.dtype)
    assert not bool((new != 0)[old == 0].any()), "a zero was lost"
    return torch.where((new == 0) & (old != 0), torch.copysign(torch.full_like(new, _SMALLEST), old), new)


class _Expand(torch.autograd.Function):
    """`expand` with its transpose, `compress`, as the gradient: nothing but positions is kept for the way back."""

    @staticmethod
    def forward(context: Any, values: Tensor, positions: Tensor) -> Tensor:
        context.save_for_backward(positions)
        return expand(values, positions)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = context.saved_tensors
        return compress(gradients[0], positions), None


class CompressedLinear(nn.Module):
    """y = x Wᵀ + b with a 2:4 weight; takes the place of an `nn.Linear`."""

    positions: Tensor

    def __init__(self, values: Tensor, positions: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("positions", positions, persistent=False)
        self.bias = bias

    @classmethod
    def of(cls, weight_nk: Tensor, mask_nk: Tensor, bias: nn.Parameter | None = None) -> "CompressedLinear":
        """Compress a weight; the values become float32, whatever they were."""
        positions = positions_of(mask_nk)
        return cls(compress(weight_nk.float(), positions), positions, bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [N, K] in a type, without history."""
        return expand(self.values.detach().to(dtype), self.positions)

    def forward(self, x: Tensor) -> Tensor:
        """In the type that autocast asks for, else in that of the values."""
        kind = x.device.type
        values = self.values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else self.values
        weight: Tensor = _Expand.apply(values, self.positions)  # type: ignore[no-untyped-call]
        return F.linear(x, weight, self.bias)
