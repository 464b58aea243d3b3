"""Linear layers whose codes and scales learn; they take the place of an `nn.Linear`.

    ScaledLinear   codes are fixed, a group has a factor to its scale, at first 1
    TunedLinear    codes learn too: a weight has an offset to where it lies on its grid, at first 0

Codes and scales are rounded on the way forward to what a checkpoint stores, and trained as if they were not (straight through).
So what is measured while training is what will be written, and the untrained layer is the quantised one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_tools.algorithms.scales import storable
from marlin_tools.quantized import LEVELS, ZERO, QuantizedLinear, round_inputs

_INSIDE = 0.49
"""How far from its code a place may be: it still rounds to it."""

_TOWARD = 0.5
"""How far a place lies from its code towards the original weight."""

_FARTHEST = 0.999
"""The longest offset; with it a code moves by one at most."""


class _Dequantize(torch.autograd.Function):
    """(code - 8) · scale, with the rounded codes in 8 bits as all that is kept for the way back."""

    @staticmethod
    def forward(context: Any, codes_nk: Tensor, scales_ng: Tensor) -> Tensor:
        steps = _grouped(codes_nk.float().round() - ZERO, scales_ng)
        context.save_for_backward(steps.to(torch.int8), scales_ng)
        return (steps * scales_ng[..., None]).flatten(1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        steps, scales_ng = context.saved_tensors
        gradient = _grouped(gradients[0], scales_ng)
        to_codes = (gradient * scales_ng[..., None]).flatten(1) if context.needs_input_grad[0] else None
        return to_codes, (gradient * steps).sum(dim=2)


def _grouped(weight_nk: Tensor, scales_ng: Tensor) -> Tensor:
    """[N, groups, G]."""
    return weight_nk.view(*scales_ng.shape, -1)


class ScaledLinear(nn.Module):
    """y = x Wᵀ + b with W = (code - 8) · scale. `dtype` is the model's own 16-bit type."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: QuantizedLinear, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self._group_size, self.dtype = bias, linear.group_size, dtype
        self.register_buffer("codes", linear.codes, persistent=False)
        self.register_buffer("scales", linear.scales.float(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(self.scales))

    def learned(self) -> dict[str, nn.Parameter]:
        """What decides codes and scales, by the names that `solved` knows."""
        return {"factor": self.factor}

    def exact_codes(self, _offset: Tensor | None = None) -> Tensor:
        """The codes before they are rounded."""
        return self.codes

    def stored_scales(self, factor: Tensor) -> Tensor:
        """The scales as they will be stored; raises where float16 cannot hold them."""
        exact = self.scales * factor
        return exact + (storable(exact.detach(), self.dtype) - exact).detach()

    @torch.no_grad()
    def solved(self, **learned: Tensor) -> QuantizedLinear:
        """Codes and scales as they are now, or as they follow from what is given in place of what `learned` holds."""
        learned = {**self.learned(), **learned}
        codes = self.exact_codes(learned.get("offset")).float().round().to(torch.uint8)
        return QuantizedLinear(codes, self.stored_scales(learned["factor"]).to(torch.float16), self._group_size)

    def forward(self, x: Tensor) -> Tensor:
        """In the type that autocast asks for, else in float32."""
        learned = self.learned()
        factor, offset = learned["factor"], learned.get("offset")
        weight: Tensor = _Dequantize.apply(  # type: ignore[no-untyped-call]
            self.exact_codes(offset), self.stored_scales(factor)
        )
        return F.linear(x, weight, self.bias)


class TunedLinear(ScaledLinear):
    """The same with codes that learn. `weight_nk` is the original weight.

    Codes that are zeros of a 2:4 mask stay zeros.
    """

    place: Tensor

    def __init__(self, linear: QuantizedLinear, weight_nk: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(linear, bias, dtype)
        codes = linear.codes.float()
        lies = weight_nk.float() / self.scales.repeat_interleave(linear.group_size, dim=1) + ZERO
        place = codes + (_TOWARD * (lies - codes)).clamp(-_INSIDE, _INSIDE)
        self.register_buffer("place", place.half(), persistent=False)
        self._zeros = codes == ZERO if linear.is_2_4() else None
        self.offset = nn.Parameter(torch.zeros_like(codes))

    def learned(self) -> dict[str, nn.Parameter]:
        """What decides codes and scales, by the names that `solved` knows."""
        return {"factor": self.factor, "offset": self.offset}

    def exact_codes(self, offset: Tensor | None = None) -> Tensor:
        """The codes before they are rounded."""
        assert offset is not None
        exact = torch.clamp(self.place.float() + offset.clamp(-_FARTHEST, _FARTHEST), 0, LEVELS - 1)
        return exact if self._zeros is None else exact.masked_fill(self._zeros, ZERO)


def free_codes(model: nn.Module, original: nn.Module) -> None:
    """Let the codes of all quantised linears of a model learn; `original` has its weights as they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLinear):
            linear, weight = module.solved(), original.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            model.set_submodule(name, TunedLinear(linear, weight, module.bias, module.dtype))


def read_rounded(model: nn.Module) -> None:
    """Let all quantised linears of a model read activations as FP8 holds them."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            round_inputs(module)
