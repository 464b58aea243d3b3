"""Block-wise tuning: codes and scales of one quantised block are trained until it puts out what the original block did.

A weight starts at a place on its grid that rounds to the code which the solver has found, and has an offset to it; a group has
a factor to its scale. Both are rounded on the way forward and trained as if they were not (straight through). At first every
offset is 0 and every factor 1, so step 0 is the solver's result. What the block reads is what the quantised blocks before it
really put out, what it is held against is the original model (`reconstruct.py`).

The last windows of the calibration text are not trained on. They decide which state is kept: the best that was measured, the
first one included, so a block either gets better on windows that it was not trained on or stays as it was.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from marlin_tools.algorithms.scales import storable
from marlin_tools.algorithms.solution import Solution
from marlin_tools.compress.reconstruct import BlockTraining
from marlin_tools.errors import NumericalError
from marlin_tools.events import Emit, Event
from marlin_tools.quantized import LEVELS, ZERO, QuantizedLinear
from marlin_tools.settings import Settings
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import Block

_LOOKS = 10
"""How often the held-out windows are measured."""

_INSIDE = 0.49
"""How far from its code a place may be: it still rounds to it."""

_TOWARD = 0.5
"""How far a place lies from its code towards the original weight."""

_FARTHEST = 0.999
"""The longest offset; with it a code moves by one at most."""


class Tuning(Settings):
    """How blocks are tuned.

    iters       steps for each block, each on one chunk of about 8192 tokens
    lr          highest learning rate of the offsets, in codes; it falls to 0 in a straight line
    minmax_lr   that of the factors of scales
    """

    iters: int = Field(200, ge=1, le=100_000)
    lr: float = Field(0.002, ge=0, le=1)
    minmax_lr: float = Field(0.002, ge=0, le=1)


def held_out(sequences: int) -> int:
    """How many of the last sequences are not trained on."""
    return max(1, sequences // 8)


class TunedLinear(nn.Module):
    """y = x Wᵀ + b with W = (code - 8) · scale; takes the place of an `nn.Linear`. `weight_nk` is the original weight.

    Codes that are zeros of a 2:4 mask stay zeros.
    """

    def __init__(self, linear: QuantizedLinear, weight_nk: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self._dtype, self._group_size = bias, dtype, linear.group_size
        self._scales = linear.scales.float()
        codes = linear.codes.float()
        lies = weight_nk.float() / self._wide(self._scales) + ZERO
        self._place = codes + (_TOWARD * (lies - codes)).clamp(-_INSIDE, _INSIDE)
        self._zeros = codes == ZERO if linear.is_2_4() else None
        self.offset = nn.Parameter(torch.zeros_like(codes))
        self.factor = nn.Parameter(torch.ones_like(self._scales))

    def _wide(self, scales_ng: Tensor) -> Tensor:
        return scales_ng.repeat_interleave(self._group_size, dim=1)

    def _codes(self) -> Tensor:
        exact = torch.clamp(self._place + self.offset.clamp(-_FARTHEST, _FARTHEST), 0, LEVELS - 1)
        codes = exact + (exact.round() - exact).detach()
        return codes if self._zeros is None else codes.masked_fill(self._zeros, ZERO)

    def _stored(self) -> Tensor:
        """The scales as they will be stored; raises where float16 cannot hold them."""
        exact = self._scales * self.factor
        return exact + (storable(exact.detach(), self._dtype) - exact).detach()

    @torch.no_grad()
    def solved(self) -> QuantizedLinear:
        """Codes and scales as they are now."""
        return QuantizedLinear(self._codes().to(torch.uint8), self._stored().to(torch.float16), self._group_size)

    def forward(self, x: Tensor) -> Tensor:
        """In the type that autocast asks for, else in float32."""
        return F.linear(x, (self._codes() - ZERO) * self._wide(self._stored()), self.bias)


def tune(
    block: Block, entering: Activations, solutions: dict[str, Solution], how: Tuning, dtype: torch.dtype, emit: Emit
) -> tuple[dict[str, Solution], dict[str, Any]]:
    """Better codes and scales of a block, or the same, and what the record of each of its linears says about that.

    `entering` is what the block reads; the stream goes on with the new weights. `dtype` is the model's own 16-bit type.
    """
    linears = block.linears()
    tuned = {
        name: TunedLinear(each.linear, block.original_weight(name), linears[name].bias, dtype)
        for name, each in solutions.items()
    }
    training = BlockTraining(block, entering, tuned)
    training.put_in()
    best = _Best(list(tuned.values()))
    train = _trained_on(entering.shapes())
    before = best.look(0, training.error(range(train, len(training))))
    try:
        _train(training, train, best, how, emit)
    except NumericalError as error:
        where = block.prefix.rstrip(".")
        best.stopped = f"`{where}`: tuning stopped ({error.message}); the state of step {best.step} is kept"
        emit(Event("note", best.stopped))
    best.restore()
    new = {name: each.solved() for name, each in tuned.items()}
    training.put_back({name: linear.dequantize(linears[name].weight.dtype) for name, linear in new.items()})
    block.rerun(entering)
    found = {"block_error": [float(f"{before:.6g}"), float(f"{best.error:.6g}")], "best_step": best.step}
    better = {name: _with(each, new[name], block.original_weight(name)) for name, each in solutions.items()}
    return better, found | ({"tuning_stopped": best.stopped} if best.stopped else {})


def _with(solution: Solution, linear: QuantizedLinear, weight_nk: Tensor) -> Solution:
    """The solution with other codes and scales; what it lost of its output is known for the solver's alone."""
    lost = (weight_nk.float() - linear.dequantize()).square().sum(dim=1, dtype=torch.float64)
    return replace(solution, weight=linear, losses=replace(solution.losses, weight=lost))


def _trained_on(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many of the first chunks are trained on, of chunks of these shapes [B, L, H]."""
    train, last = len(shapes), held_out(sum(shape[0] for shape in shapes))
    while last > 0:
        train -= 1
        last -= shapes[train][0]
    assert last == 0 < train, f"a chunk is trained on and held out: {shapes}"
    return train


class _Best:
    """The best state so far, by the error on what is held out."""

    def __init__(self, linears: Sequence[TunedLinear]) -> None:
        self.offsets, self.factors = [each.offset for each in linears], [each.factor for each in linears]
        self.parameters = [*self.offsets, *self.factors]
        self.error, self.step, self.stopped = math.inf, 0, ""
        self._state: list[Tensor] = []

    def look(self, step: int, error: float) -> float:
        """Keep the state of this step if none before had so small an error."""
        if not math.isfinite(error):
            raise NumericalError(f"the error is not finite at step {step}", hint="use a lower learning rate")
        if error < self.error:
            self.error, self.step = error, step
            self._state = [parameter.detach().clone() for parameter in self.parameters]
        return error

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to it."""
        for parameter, value in zip(self.parameters, self._state, strict=True):
            parameter.copy_(value)


def _train(training: BlockTraining, train: int, best: _Best, how: Tuning, emit: Emit) -> None:
    """Every chunk of activations is a step; rates fall to 0 in a straight line."""
    rates = (how.lr, how.minmax_lr)
    adam = torch.optim.Adam([{"params": best.offsets}, {"params": best.factors}], lr=0.0, betas=(0.9, 0.95))
    looks = {math.ceil(how.iters * (number + 1) / _LOOKS) for number in range(_LOOKS)}
    for step in range(1, how.iters + 1):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - (step - 1) / how.iters)
        gradients = training.gradients((step - 1) % train, best.parameters)
        for parameter, gradient in zip(best.parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        if step in looks:
            error = best.look(step, training.error(range(train, len(training))))
            emit(Event("progress", f"{training.prefix}tuning", step, how.iters, {"held_out_error": error}))
