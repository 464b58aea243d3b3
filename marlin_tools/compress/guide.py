"""What the outputs of each linear are worth to the model: the guide by which rows make up for each other (`coupled.py`).

The original model reads the first windows of the calibration text and draws a word behind each token from what it expects
there itself, so nothing of the text's own words goes in. The gradients of the log-likelihood of these words say how much, and
in which directions, an error anywhere changes what the model expects (the Fisher information).

Only one block is resident at a time. On the way forward what each block reads is put on disk, on the way back it is replaced by
the gradient at what the block puts out. When a block is to be solved, its original weights see this text once more, and the
gradient comes down to each linear.

Three kinds are left out. What opens a feed-forward network goes neuron by neuron through an activation, and its rows know so
little of each other that nothing is gained. Each expert sees too little of so short a text. And of very many outputs the matrix
would be larger than the block.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from marlin_tools.algorithms.coupled import Aiming, Coupled, Worth
from marlin_tools.algorithms.hessian import Gram
from marlin_tools.algorithms.solution import Problem
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.compress.reconstruct import put_out, widened
from marlin_tools.data.tokens import TokenSet
from marlin_tools.events import Emit, Event
from marlin_tools.stopwatch import span
from marlin_tools.stream.head import OutputHead
from marlin_tools.stream.inventory import Inventory
from marlin_tools.stream.layer_stream import Block, Group, LayerStream

LOOKED_AT = 32_768
"""Calibration tokens that are read, in whole windows."""

WIDEST = 16_384
"""Outputs of a linear, at most."""

_AT_ONCE = 2048
"""Tokens whose logits exist at a time."""

_SEED = 0
_STATE = "guide.json"


def what_is_read(tokens: int) -> str:
    """For people, of so much text."""
    return f"gradients of the original, from the first {min(tokens, LOOKED_AT):,} tokens"


def _file(index: int) -> str:
    return f"guide-{index:05}.safetensors"


class Guide:
    """The guide for one run in one process; `facts` is what the manifest says about it."""

    def __init__(self, inventory: Inventory, emit: Emit) -> None:
        self.facts: dict[str, Any] = {}
        self._linears = frozenset(each.name for each in inventory.targets if each.share == 1 and each.n <= WIDEST)
        self._emit = emit
        self._output: OutputDirectory | None = None
        self._grams: dict[str, Gram] = {}

    def make(self, tokens: TokenSet, stream_of: Callable[[TokenSet], LayerStream], output: OutputDirectory) -> None:
        """Read and go back, or take what an interrupted run has found."""
        self._output = output
        if not (output.state / _STATE).is_file():
            seen = tokens.first(LOOKED_AT)
            with span("guide"):
                self._read(stream_of(seen), output)
            output.write_state(_STATE, json.dumps({"tokens": seen.tokens, "seed": _SEED}))
        self.facts = json.loads((output.state / _STATE).read_text(encoding="utf-8"))

    def _read(self, stream: LayerStream, output: OutputDirectory) -> None:
        """The gradient at what each block puts out, on disk."""
        assert stream.hidden is not None, "nothing to read"
        count = len(stream)
        for block in stream:
            output.write_state_tensors(_file(block.index), {str(i): chunk for i, chunk in enumerate(stream.hidden)})
            block.skip()
            self._emit(Event("progress", "blocks, to see what outputs are worth", block.index + 1, 2 * count))
        generator = torch.Generator(stream.device).manual_seed(_SEED)
        head = stream.head()
        slopes = [_at_the_top(head, chunk, generator) for chunk in stream.hidden]
        for block in stream.walk(range(count)[::-1]):
            read = load_file(output.state / _file(block.index))
            joined = torch.cat([slope.flatten(0, -2) for slope in slopes]).bfloat16()
            output.write_state_tensors(_file(block.index), {"slopes": joined})
            calls = stream.contexts(block.index, stream.hidden)
            for i, slope in enumerate(slopes) if block.index else ():
                slopes[i] = _below(block, read[str(i)].to(stream.device), widened(calls[i]), slope)
            self._emit(Event("progress", "blocks, to see what outputs are worth", 2 * count - block.index, 2 * count))

    def look(self, block: Block) -> None:
        """See what the outputs of this block's linears are worth, while it has the original weights."""
        original, device = block.stream.original, block.stream.device
        assert self._output is not None, "not made"
        assert original is not None, "the original model does not run alongside"
        told = self._linears & _told(block)
        linears = {name: linear for name, linear in block.linears().items() if name in told}
        self._grams = {name: Gram(linear.out_features, device) for name, linear in linears.items()}
        slopes = load_file(self._output.state / _file(block.index))["slopes"].to(device)
        calls = block.stream.contexts(block.index, original)
        with span("guide"):
            hooks = [linear.register_forward_hook(_watching(self._grams[name])) for name, linear in linears.items()]
            start = 0
            for i, shape in enumerate(original.shapes()):
                own = slopes[start : start + shape[0] * shape[1]]
                if not len(own):
                    break
                start += len(own)
                slope = torch.zeros(shape, device=device)
                slope.view(-1, shape[-1])[: len(own)] = own
                _below(block, original[i], widened(calls[i]), slope)
            for hook in hooks:
                hook.remove()
        for gram in self._grams.values():
            gram.tokens = len(slopes)

    def couple(self, problem: Problem, group: Group) -> Problem:
        """The problem with its rows told of each other, if it is known what they are worth."""
        known = {name: gram for name in group.names if (gram := self._grams.pop(name, None)) is not None}
        if not known:
            return problem
        assert isinstance(problem, Aiming), type(problem)
        worths: list[tuple[slice, Worth | None]] = []
        for name, rows in group.rows():
            worth = None
            if name in known and bool(torch.isfinite(known[name].total).all()):
                worth = Worth.of(name, known.pop(name).hessian())
            elif name in known:
                self._emit(Event("note", f"`{name}`: gradients are not finite; its rows are solved each for itself"))
            worths.append((rows, worth))
        return Coupled(problem, worths)


def _told(block: Block) -> set[str]:
    """Linears whose rows know of each other: those of attention, and those that close a branch."""
    layout, names = block.stream.layout, set[str]()
    for branch in layout.branches(block.index):
        inside = (*branch.entry, *branch.inner) if branch.attends else ()
        names |= {layout.linear(block.index, f"{branch.body}.{name}") or "" for name in (*inside, branch.exit)}
    return names


def _at_the_top(head: OutputHead, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient at what the last block puts out, of words that are drawn here, summed over tokens."""
    slope = torch.empty_like(hidden, dtype=torch.float32)
    for own, below in zip(hidden.flatten(0, -2).split(_AT_ONCE), slope.flatten(0, -2).split(_AT_ONCE), strict=True):
        with torch.enable_grad():
            leaf = own.detach().requires_grad_()
            logits = head(leaf)
            words = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, words, reduction="sum")
            below.copy_(torch.autograd.grad(loss, leaf)[0])
    return slope


def _below(block: Block, hidden: Tensor, call: dict[str, Any], slope: Tensor) -> Tensor:
    """The gradient at what the block reads, from that at what it puts out."""
    with torch.enable_grad():
        leaf = hidden.detach().float().requires_grad_()
        return torch.autograd.grad(put_out(block, leaf, call), leaf, slope.to(leaf))[0]


def _watching(gram: Gram) -> Callable[..., None]:
    """A hook that adds up what comes back to the outputs of a linear."""

    def see(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda slope: gram.add(slope.contiguous()))

    return see
