"""Linear layers whose codes and scales learn; they take the place of an `nn.Linear`.

    ScaledLinear   codes are fixed, a group has a factor to its scale, at first 1
    TunedLinear    codes learn too: a weight has an offset to where it lies on its grid, at first 0

Codes and scales are rounded on the way forward to what a checkpoint stores, and trained as if they were not (straight through).
So what is measured while training is what will be written, and the untrained layer is the quantised one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_tools.algorithms.scales import nearest_storable, too_large
from marlin_tools.quantized import LEVELS, ZERO, QuantizedLinear, round_inputs

_INSIDE = 0.49
"""How far from its code a place may be: it still rounds to it."""

_TOWARD = 0.5
"""How far a place lies from its code towards the original weight."""

_FARTHEST = 0.999
"""The longest offset; with it a code moves by one at most."""


@dataclass(frozen=True)
class Rounded:
    """What a linear multiplies with: steps (a step is a code - 8) and scales as a checkpoint stores them.

    `passed_nk` is where the gradient of an offset passes; None if codes are fixed.
    """

    steps_nk: Tensor
    scales_ng: Tensor
    passed_nk: Tensor | None = None


class _Product(torch.autograd.Function):
    """x Wᵀ + b with W = step · scale.

    Nothing of W is kept for the way back: it is made again from the steps, which have 8 bits. `scales_ng` are what a factor is
    multiplied with. Of factor and offset only the gradients are wanted.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, bias_n: Tensor | None, *learned: Any) -> Tensor:
        _factor_ng, _offset_nk, scales_ng, rounded = learned
        context.save_for_backward(x, scales_ng, rounded.steps_nk, rounded.scales_ng, rounded.passed_nk)
        weight_nk = _weight(rounded.steps_nk, rounded.scales_ng, x.dtype)
        return F.linear(x, weight_nk, None if bias_n is None else bias_n.to(x.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, exact_ng, steps_nk, scales_ng, passed_nk = context.saved_tensors
        wants_x, wants_bias, wants_factor, wants_offset, *_ = context.needs_input_grad
        toward = gradients[0].flatten(0, -2)
        to_x = (toward @ _weight(steps_nk, scales_ng, x.dtype)).view(x.shape) if wants_x else None
        to_bias = toward.sum(dim=0, dtype=torch.float32) if wants_bias else None
        to_factor = to_offset = None
        if wants_factor or wants_offset:
            to_weight = _grouped((toward.T @ x.flatten(0, -2)).float(), scales_ng)
            to_factor = (to_weight * _grouped(steps_nk, scales_ng)).sum(dim=2).mul_(exact_ng)
            to_offset = to_weight.mul_(scales_ng[..., None]).flatten(1).mul_(passed_nk) if wants_offset else None
        return to_x, to_bias, to_factor, to_offset, None, None


def _weight(steps_nk: Tensor, scales_ng: Tensor, dtype: torch.dtype) -> Tensor:
    """The products in float32, rounded once as they are written."""
    weight_nk = torch.empty(steps_nk.shape, dtype=dtype, device=steps_nk.device)
    torch.mul(_grouped(steps_nk, scales_ng), scales_ng[..., None], out=_grouped(weight_nk, scales_ng))
    return weight_nk


def _grouped(weight_nk: Tensor, scales_ng: Tensor) -> Tensor:
    """[N, groups, G]."""
    return weight_nk.view(*scales_ng.shape, -1)


class ScaledLinear(nn.Module):
    """y = x Wᵀ + b with W = (code - 8) · scale. `dtype` is the model's own 16-bit type."""

    steps: Tensor
    scales: Tensor
    _kept: list[Rounded] | None

    def __init__(self, linear: QuantizedLinear, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self._group_size, self.dtype = bias, linear.group_size, dtype
        self.register_buffer("steps", linear.codes.to(torch.int8) - ZERO, persistent=False)
        self.register_buffer("scales", linear.scales.float(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(self.scales))
        self._kept = None

    def keep(self, *, on: bool) -> None:
        """Round once from now on; or again each time."""
        self._kept = [] if on else None

    def learned(self) -> dict[str, nn.Parameter]:
        """What decides codes and scales, by the names that `solved` knows."""
        return {"factor": self.factor}

    @torch.no_grad()
    def rounded(self, factor: Tensor, offset: Tensor | None = None) -> Rounded:
        """What follows from these. Scales that float16 cannot hold are infinite, and so is what comes out."""
        assert offset is None, "codes are fixed"
        return Rounded(self.steps, nearest_storable(self.scales * factor, self.dtype))

    @torch.no_grad()
    def solved(self, **learned: Tensor) -> QuantizedLinear:
        """Codes and scales as they are now, or as they follow from what is given in place of what `learned` holds."""
        learned = {**self.learned(), **learned}
        rounded = self.rounded(**learned)
        if not bool(rounded.scales_ng.isfinite().all()):
            raise too_large()
        return QuantizedLinear((rounded.steps_nk + ZERO).to(torch.uint8), rounded.scales_ng.to(torch.float16), self._group_size)

    def forward(self, x: Tensor) -> Tensor:
        """In the type that autocast asks for, else in float32."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)
        learned = self.learned()
        (rounded,) = self._kept or [self.rounded(**learned)]
        if self._kept is not None:
            self._kept = [rounded]
        y: Tensor = _Product.apply(x, self.bias, self.factor, learned.get("offset"), self.scales, rounded)  # type: ignore[no-untyped-call]
        return y


class TunedLinear(ScaledLinear):
    """The same with codes that learn. `weight_nk` is the original weight.

    Codes that are zeros of a 2:4 mask stay zeros. A place leans towards the original weight, so codes that it does not agree
    with move first; `steady`, only where that weight has the same code. What is kept of 2:4 linears makes up for what is not,
    and a whole model loses that if many codes go back at once.
    """

    place: Tensor

    def __init__(
        self, linear: QuantizedLinear, weight_nk: Tensor, bias: nn.Parameter | None, dtype: torch.dtype, *, steady: bool = False
    ) -> None:
        super().__init__(linear, bias, dtype)
        codes = linear.codes.float()
        away = weight_nk.float() / self.scales.repeat_interleave(linear.group_size, dim=1) + ZERO - codes
        if steady:
            away = torch.where(away.abs() > 0.5, 0.0, away)
        self.register_buffer("place", (codes + (_TOWARD * away).clamp(-_INSIDE, _INSIDE)).half(), persistent=False)
        self._zeros = codes == ZERO if linear.is_2_4() else None
        del self.steps  # they follow from the offset
        self.offset = nn.Parameter(torch.zeros_like(codes))

    def learned(self) -> dict[str, nn.Parameter]:
        """What decides codes and scales, by the names that `solved` knows."""
        return {"factor": self.factor, "offset": self.offset}

    @torch.no_grad()
    def rounded(self, factor: Tensor, offset: Tensor | None = None) -> Rounded:
        """The same; the gradient of an offset does not pass at the ends of what it may reach."""
        assert offset is not None, "codes learn"
        exact = offset.clamp(-_FARTHEST, _FARTHEST).add_(self.place)
        passed = (offset.abs() <= _FARTHEST) & (exact >= 0) & (exact <= LEVELS - 1)
        steps = exact.clamp_(0, LEVELS - 1).round_().sub_(ZERO).to(torch.int8)
        if self._zeros is not None:
            steps.masked_fill_(self._zeros, 0)
            passed &= ~self._zeros
        return Rounded(steps, nearest_storable(self.scales * factor, self.dtype), passed)


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within, all quantised linears of a model round once what they learn, which nobody may change meanwhile."""
    linears = [module for module in model.modules() if isinstance(module, ScaledLinear)]
    for linear in linears:
        linear.keep(on=True)
    try:
        yield
    finally:
        for linear in linears:
            linear.keep(on=False)


def free_codes(model: nn.Module, original: nn.Module) -> None:
    """Let the codes of all quantised linears of a model learn; `original` has their weights as they were, by the same names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLinear):
            linear, weight = module.solved(), original.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            model.set_submodule(name, TunedLinear(linear, weight, module.bias, module.dtype, steady=linear.is_2_4()))


def read_rounded(model: nn.Module) -> None:
    """Let all quantised linears of a model read activations as FP8 holds them."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            round_inputs(module)
