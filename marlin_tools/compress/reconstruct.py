"""Block-wise reconstruction: the kept weights of one pruned block are trained until it puts out what the original block did.

Pruning one linear after the other leaves each of them the best it can be for its own output. A block as a whole can do better:
its linears can make up for each other. Its inputs are what the pruned blocks before it really put out, its targets what the
original model has at this place, so it also undoes drift. The mask does not move (`training/compressed.py`), the rest of the
block stays as it is, and only one block is ever trained, so this needs no more memory than pruning does.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.events import Emit, Event
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.layer_stream import Block
from marlin_tools.stream.token_weights import token_weights
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
    linears = block.linears()
    here = {name: weight.to(linears[name].weight.device) for name, weight in weights.items()}
    compressed = {name: CompressedLinear.of(weight, weight != 0, linears[name].bias) for name, weight in here.items()}
    training = BlockTraining(block, entering, compressed)
    before = training.error()
    training.put_in()
    _train(training, [linear.values for linear in compressed.values()], how, emit)
    trained = {name: linear.weight(weights[name].dtype) for name, linear in compressed.items()}
    training.put_back(trained)
    after = training.error()
    chosen = trained if after < before else weights
    training.put_back(chosen)
    block.rerun(entering)
    return chosen, before, min(before, after)


def _train(training: "BlockTraining", values: list[nn.Parameter], how: Reconstruction, emit: Emit) -> None:
    """Every chunk of activations is a step."""
    chunks = len(training)
    steps = how.passes * chunks
    adam = torch.optim.Adam(values, betas=(0.9, 0.95))
    for step in range(steps):
        adam.param_groups[0]["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for value, gradient in zip(values, training.gradients(step % chunks, values), strict=True):
            value.grad = gradient
        adam.step()
        if (step + 1) % chunks == 0:
            emit(Event("progress", f"{training.prefix}reconstruction", (step + 1) // chunks, how.passes))


class BlockTraining:
    """One block, what it reads, and what the original put out; `stand_ins` take its linears' places while it is trained."""

    def __init__(self, block: Block, entering: Activations, stand_ins: Mapping[str, nn.Module]) -> None:
        assert block.stream.original is not None, "the original model does not run alongside"
        self.prefix = block.prefix
        self._block, self._stand_ins = block, stand_ins
        self._entering, self._targets = entering, block.stream.original
        self._calls = [widened(call) for call in block.stream.contexts(block.index, entering)]
        self._linears = block.linears()
        self._weights: list[Tensor] = []
        self._energies: list[float] = []
        for target in self._targets:
            self._weights.append(weights := token_weights(target))
            self._energies.append(float((target.float() * weights).square().sum(dtype=torch.float64)))
        energy = sum(self._energies)
        self._share = len(entering) / energy if energy else 0.0

    def __len__(self) -> int:
        return len(self._entering)

    def put_in(self) -> None:
        """The stand-ins, in the places of the linears."""
        for name, linear in self._stand_ins.items():
            self._block.put(name, linear)

    def put_back(self, weights: Mapping[str, Tensor]) -> None:
        """The block's own linears again, with these weights."""
        for name, weight in weights.items():
            self._linears[name].weight.data.copy_(weight)
            self._block.put(name, self._linears[name])

    @torch.no_grad()
    def error(self, chunks: Iterable[int] | None = None) -> float:
        """Squared error of the output relative to its square, over some of the chunks or all."""
        lost = energy = 0.0
        for i in range(len(self)) if chunks is None else chunks:
            lost, energy = lost + float(self._lost(i)), energy + self._energies[i]
        return lost / energy if energy else 0.0

    def gradients(self, i: int, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of the error of one chunk, relative to what an average chunk puts out; None for an expert that it does not reach."""
        with torch.enable_grad():
            loss = self._lost(i) * self._share
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    def _lost(self, i: int) -> Tensor:
        """Squared error of one chunk."""
        out = put_out(self._block, self._entering[i].float(), self._calls[i])
        return ((out - self._targets[i].float()) * self._weights[i]).square().sum()


def put_out(block: Block, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    """What a block makes of this, both in float32, with a way back for gradients; linears multiply in 16 bits on a GPU."""
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
        out = block.module(hidden, **call)
    out = out[0] if isinstance(out, tuple) else out
    assert isinstance(out, Tensor)
    return out.float()


def widened(call: Any) -> Any:
    """What a block is called with, its floating-point tensors in float32."""
    if isinstance(call, dict):
        return {key: widened(value) for key, value in call.items()}
    if isinstance(call, (tuple, list)):
        return type(call)(widened(value) for value in call)
    return call.float() if isinstance(call, Tensor) and call.is_floating_point() else call
