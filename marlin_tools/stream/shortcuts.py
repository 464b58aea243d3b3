"""One kernel where the models' own code takes ten: norms and rotations of the activations on a GPU.

transformers writes both in elementary operations, each of which reads and writes all activations, and in a stream that is
bound by matrix products these make up a sixth of the time. A shortcut is taken only where it does what the model's code does,
which is tried on random numbers first: a rotation to the last bit, a norm up to the order in which a row's squares are added.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.ops.model.decode import MOST_COLUMNS, add_norm
from marlin_tools.ops.model.rotation import can_rotate, rotate
from marlin_tools.ops.runtime.kernel import ELEMENTS

_ROTATION = "apply_rotary_pos_emb"
"""What transformers' models call it, each in its own module."""

_FEWEST_COLUMNS = 1024
"""Norms of single heads are too narrow for a thread block of their own."""

Rotate = Callable[..., tuple[Tensor, Tensor]]


def shorten_norms(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Let the RMS norms of a model on the meta device use the kernel, where they agree with it; returns how many."""
    if device.type != "cuda" or dtype not in ELEMENTS:
        return 0
    norms = [module for module in model.modules() if _might_be_short(module)]
    verdicts: dict[tuple[type[nn.Module], int], bool] = {}
    count = 0
    for norm in norms:
        kind = type(norm)
        size = sum(parameter.numel() for parameter in norm.parameters())
        if (kind, size) not in verdicts:
            verdicts[kind, size] = _norm_agrees(norm, size, device, dtype)
        if verdicts[kind, size]:
            norm.__class__ = _shortened(kind)  # type: ignore[arg-type]
            count += 1
    return count


def shorten_rotations(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Let the attention of a model rotate by the kernel, where that agrees with its own code; returns how many do."""
    if device.type != "cuda" or dtype not in ELEMENTS:
        return 0
    rotating = [module for module in model.modules() if _rotates(type(module))]
    for module in rotating:
        kind: Any = type(module)
        module.__class__ = _rotating_shortly(kind)
    return len(rotating)


def _rotates(kind: type[nn.Module]) -> bool:
    """Whether the forward of a module calls the function that rotates queries and keys together."""
    forward = vars(kind).get("forward")
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(_ROTATION)
    return callable(own) and list(signature(own).parameters)[:4] == ["q", "k", "cos", "sin"]


@cache
def _rotating_shortly(kind: type[nn.Module]) -> type[nn.Module]:
    """The same attention, whose code finds another function under that name; nobody else's does."""
    own: FunctionType = vars(kind)["forward"]
    names = {**own.__globals__, _ROTATION: partial(_rotated, own.__globals__[_ROTATION])}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return type(f"Shortened{kind.__name__}", (kind,), {"forward": forward})


def _might_be_short(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return False
    return hasattr(module, "variance_epsilon") and weight.numel() % 8 == 0 and _FEWEST_COLUMNS <= weight.numel() <= MOST_COLUMNS


@cache
def _shortened(kind: type[nn.Module]) -> type[nn.Module]:
    """The same norm, short where no gradients are asked for."""

    class ShortNorm(kind):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states
            if torch.is_grad_enabled() or not x.is_cuda or x.dtype != self.weight.dtype:
                own: Tensor = super().forward(x)
                return own
            return add_norm(x.reshape(-1, x.shape[-1]), None, self.weight, self.variance_epsilon).view(x.shape)

    return ShortNorm


def _norm_agrees(norm: nn.Module, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """On random numbers: never more than one step of the type apart, and nearly always the same."""
    generator = torch.Generator(device).manual_seed(0)
    probe = copy.deepcopy(norm).to_empty(device=device).to(dtype)
    weight = torch.randn(columns, generator=generator, device=device).mul_(0.2).add_(1).to(dtype)
    probe.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(64, columns, generator=generator, device=device).mul_(3).to(dtype)
    with torch.no_grad():
        own, short = probe(x), add_norm(x, None, weight, float(probe.variance_epsilon))  # type: ignore[arg-type]
    apart = (own.float() - short.float()).abs() > own.float().abs() * (2 * torch.finfo(dtype).eps)
    return not bool(apart.any()) and float((own == short).float().mean()) > 0.99


def _rotated(own: Rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated in place, or as the model does it."""
    if rest or named or torch.is_grad_enabled() or not can_rotate(q, k, cos, sin):
        return own(q, k, cos, sin, *rest, **named)
    if not _rotation_agrees(own, q.device, q.dtype, q.shape[-1]):
        return own(q, k, cos, sin)
    rotate(q, k, cos, sin)
    return q, k


@cache
def _rotation_agrees(own: Rotate, device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """On random numbers, bit by bit."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(2, 32, heads, head, generator=generator, device=device).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.rand(1, 32, head, generator=generator, device=device).mul(2).sub(1).to(dtype) for _ in range(2))
    own_q, own_k = own(q, k, cos, sin)
    rotate(q, k, cos, sin)
    return torch.equal(q, own_q) and torch.equal(k, own_k)
