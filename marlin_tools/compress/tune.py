"""Block-wise tuning: codes and scales of one quantised block are trained until it puts out what the original block did.

What is trained are the offsets and factors of `training/scaled.py`. They are 0 and 1 at first, so step 0 is the solver's
result. What the block reads is what the quantised blocks before it really put out, what it is held against is the original
model (`reconstruct.py`).

The last windows of the calibration text are not trained on. They decide which state is kept: the best that was measured, the
first one included, so a block either gets better on windows that it was not trained on or stays as it was.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.algorithms.solution import Solution
from marlin_tools.compress.reconstruct import BlockTraining
from marlin_tools.errors import NumericalError
from marlin_tools.events import Emit, Event
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.settings import Settings
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Block
from marlin_tools.training.scaled import TunedLinear

STEP_TOKENS = {"cuda": CHUNK_TOKENS, "cpu": 1024}
"""What goes through a block at a time, and is trained on in a step. A CPU gains as much from less, a GPU would idle."""

_MOST, _TOKENS_A_STEP = 400, 640
"""What the preset `max` does after `default`: so many steps, fewer where there is less text."""

_RATE, _SPARSE_RATE = 0.005, 0.02

_LOOKS = 10
"""How often the held-out windows are measured."""


class Tuning(Settings):
    """How blocks are tuned.

    iters       steps for each block, each on one chunk of about 8192 tokens, or 1024 on a CPU; none if it is 0
    lr          highest learning rate of the offsets, in codes; it falls to 0 in a straight line. By default 0.005, with a
                `sparsity` 0.02: what is kept of 2:4 linears has more to make up for
    minmax_lr   that of the factors of scales
    """

    iters: int = Field(200, ge=0, le=100_000)
    lr: float | None = Field(None, ge=0, le=1)
    minmax_lr: float = Field(0.005, ge=0, le=1)

    @classmethod
    def of_max(cls, tokens: int) -> Self:
        """How the preset `max` does it on so much text."""
        return cls(iters=min(_MOST, max(1, tokens // _TOKENS_A_STEP)))

    def fitted(self, *, sparse: bool) -> Self:
        """With the rate that suits the linears where nobody chose."""
        return self if self.lr is not None else self.model_copy(update={"lr": _SPARSE_RATE if sparse else _RATE})


def held_out(sequences: int) -> int:
    """How many of the last sequences are not trained on."""
    return max(1, sequences // 8)


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
    assert how.lr is not None, "a rate that nobody chose"
    rates = (how.lr, how.minmax_lr)
    groups = [{"params": best.offsets}, {"params": best.factors}]
    adam = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), fused=best.offsets[0].is_cuda)
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
