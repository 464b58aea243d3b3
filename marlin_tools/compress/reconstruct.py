"""Block-wise reconstruction: the kept weights of one pruned block are trained until it puts out what the original block did.

Pruning one linear after the other leaves each of them the best it can be for its own output. A block as a whole can do better:
its linears can make up for each other. Its inputs are what the pruned blocks before it really put out, its targets what the
original model has at this place, so it also undoes drift. The mask does not move (`training/compressed.py`), the rest of the
block stays as it is, and only one block is ever trained, so this needs no more memory than pruning does.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.events import Emit, Event
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import Block
from marlin_tools.training.compressed import CompressedLinear


@dataclass(frozen=True)
class Reconstruction:
    """`passes` over the calibration tokens with Adam, whose rate falls from `rate` to 0 along a cosine."""

    passes: int
    rate: float


def reconstruct(
    block: Block, entering: Activations, weights: dict[str, Tensor], how: Reconstruction, emit: Emit
) -> tuple[dict[str, Tensor], float, float]:
    """The trained weights by name, and the relative squared error of the block's output before and after.

    `entering` is what the block reads. The stream goes on with the new weights, or with the old ones should they be better.
    """
    training = _Training(block, entering, weights)
    before = training.error()
    training.run(how, emit)
    for name, weight in training.weights().items():
        training.linears[name].weight.data.copy_(weight)
    training.put_back()
    after = training.error()
    chosen = training.weights() if after < before else weights
    for name, weight in chosen.items():
        training.linears[name].weight.data.copy_(weight)
    block.rerun(entering)
    return chosen, before, min(before, after)


class _Training:
    """One block, with compressed linears while it is trained."""

    def __init__(self, block: Block, entering: Activations, weights: dict[str, Tensor]) -> None:
        assert block.stream.original is not None, "the original model does not run alongside"
        self._module, self._prefix = block.module, block.prefix
        self._entering, self._targets = entering, block.stream.original
        self._calls = [_widened(call) for call in block.stream.contexts(block.index)]
        self._types = {name: weight.dtype for name, weight in weights.items()}
        self.linears: dict[str, nn.Linear] = {
            name: self._module.get_submodule(self._inside(name))  # type: ignore[misc]
            for name in weights
        }
        self._compressed = {
            name: CompressedLinear.of(
                weight.to(self.linears[name].weight.device),
                weight.to(self.linears[name].weight.device) != 0,
                self.linears[name].bias,
            )
            for name, weight in weights.items()
        }
        self._energy = sum(float(t.float().square().sum(dtype=torch.float64)) for t in self._targets)

    def _inside(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def weights(self) -> dict[str, Tensor]:
        """The weights as the checkpoint's type holds them."""
        return {name: linear.weight(self._types[name]) for name, linear in self._compressed.items()}

    def put_back(self) -> None:
        """The block's own linears again."""
        for name, linear in self.linears.items():
            self._module.set_submodule(self._inside(name), linear)

    @torch.no_grad()
    def error(self) -> float:
        """Squared error of the output relative to its square."""
        lost = 0.0
        for i in range(len(self._entering)):
            lost += float(self._lost(i))
        return lost / self._energy if self._energy else 0.0

    def run(self, how: Reconstruction, emit: Emit) -> None:
        """Train; every chunk of activations is a step."""
        for name, linear in self._compressed.items():
            self._module.set_submodule(self._inside(name), linear)
        values = [linear.values for linear in self._compressed.values()]
        steps = how.passes * len(self._entering)
        adam = torch.optim.Adam(values, betas=(0.9, 0.95))
        share = len(self._entering) / self._energy if self._energy else 0.0
        for step in range(steps):
            adam.param_groups[0]["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.enable_grad():
                loss = self._lost(step % len(self._entering)) * share
                gradients = torch.autograd.grad(loss, values)
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = gradient
            adam.step()
            if (step + 1) % len(self._entering) == 0:
                emit(Event("progress", f"{self._prefix}reconstruction", (step + 1) // len(self._entering), how.passes))

    def _lost(self, i: int) -> Tensor:
        """Squared error of one chunk."""
        h = self._entering[i].float()
        with torch.autocast(h.device.type, torch.bfloat16, enabled=h.is_cuda):
            out = self._module(h, **self._calls[i])
        out = out[0] if isinstance(out, tuple) else out
        return (out.float() - self._targets[i].float()).square().sum()


def _widened(call: Any) -> Any:
    """The same call with its floating-point tensors in float32."""
    if isinstance(call, dict):
        return {key: _widened(value) for key, value in call.items()}
    if isinstance(call, (tuple, list)):
        return type(call)(_widened(value) for value in call)
    return call.float() if isinstance(call, Tensor) and call.is_floating_point() else call
