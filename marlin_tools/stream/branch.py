"""All calibration activations on their way through one branch of a block, in three passes over the chunks.

    enter      what the entry linears read        ... which are then replaced
    advance    what the closing linear reads      ... which is then replaced
    close      the branch's outputs join the residual stream

The original model's activations, if they flow alongside, go through the original weights in step and wait for nobody: what they
are inside the branch is seen once, chunk by chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import Cross, Drift, Gram, Hessian
from marlin_tools.distributed.crew import Crew, Pairs
from marlin_tools.families import Branch
from marlin_tools.ops.solver.products import Parts, lower, product
from marlin_tools.stopwatch import span
from marlin_tools.stream.activations import Activations, Room
from marlin_tools.stream.shortcuts import short_rotation

_PANEL = 4096
"""Columns of a product that are computed at a time; its right factor is cut in two, which takes twice its memory."""


@dataclass(frozen=True)
class Share:
    """This process's share of the text.

    crew      all processes
    part_of   which part of the text each chunk belongs to
    tokens    how many tokens all processes have together
    """

    crew: Crew
    part_of: Sequence[int]
    tokens: int


@dataclass(frozen=True)
class Flow:
    """What the branches of a block have in common.

    original   the original model's activations, if they are wanted
    contexts   what the block is called with besides them, chunk by chunk
    room       what stays on the device
    share      whose the chunks are
    """

    original: Activations | None
    contexts: Sequence[dict[str, Any]]
    room: Room
    share: Share


class _Path:
    """The way of one model's activations through one branch."""

    def __init__(self, block: nn.Module, branch: Branch, contexts: Sequence[dict[str, Any]]) -> None:
        self.enter = block.get_submodule(branch.pre)
        self._post = block.get_submodule(branch.post) if branch.post else nn.Identity()
        self._body, self._branch, self._contexts = block.get_submodule(branch.body), branch, contexts
        closing = self._body.get_submodule(branch.exit)
        assert isinstance(closing, nn.Linear), branch.exit
        self.closing = closing

    def advance(self, x: Tensor, chunk: int) -> Tensor:
        """What the closing linear reads: the body with its closing linear bypassed."""
        setattr(self._body, self._branch.exit, nn.Identity())
        if self._branch.attends:
            with short_rotation(self._body):
                x = self._body(hidden_states=x, **self._contexts[chunk])[0]
        else:
            x = self._body(x)
        setattr(self._body, self._branch.exit, self.closing)
        return x

    def close(self, x: Tensor) -> Tensor:
        """The branch's output, which is added to the residual stream."""
        output: Tensor = self._post(self.closing(x))
        return output


class BranchWalk:
    """See the top of this file. `now` is the block with the weights that it has by now, `before` that of the original model."""

    def __init__(self, branch: Branch, now: nn.Module, before: nn.Module | None, hidden: Activations, flow: Flow) -> None:
        self._room, self._hidden, self._original, self._share = flow.room, hidden, flow.original, flow.share
        self._joins = branch.post is None
        self._now = _Path(now, branch, flow.contexts)
        self._before = _Path(before, branch, flow.contexts) if before is not None else None
        self._inputs: dict[int, Tensor] = {}
        self._inputs_0: dict[int, Tensor] = {}
        self._inner: dict[int, Tensor] = {}

    def enter(self, *, observed: bool) -> Hessian | None:
        """Look at what the entry linears read."""
        watch = _Watch(self._share)
        if not observed:
            return None
        for i in range(len(self._hidden)):
            x, x_0 = self._entering(i)
            watch.see(i, x, None if x_0 is None else x_0 - x)
            if self._room.inputs:
                self._inputs[i] = x
                if x_0 is not None:
                    self._inputs_0[i] = x_0
        return watch.hessian()

    def advance(self, *, observed: bool) -> Hessian | None:
        """Compute what the closing linear reads, and move the original model's activations past the branch."""
        closing = self._now.closing if self._joins and self._before is not None else None
        watch, left = _Watch(self._share, closing), self._room.inner
        for i in range(len(self._hidden)):
            x, x_0 = self._entering(i)
            x = self._now.advance(x, i)
            if x.nbytes <= left:
                self._inner[i], left = x, left - x.nbytes
            owed = None
            if self._before is not None and self._original is not None and x_0 is not None:
                x_0 = self._before.advance(x_0, i)
                out_0, h_0 = self._before.close(x_0), self._original[i]
                if observed:
                    owed = (h_0 - self._hidden[i]).add_(out_0) if closing is not None else x_0 - x
                self._original[i] = h_0.add_(out_0)
            if observed:
                watch.see(i, x, owed)
        return watch.hessian() if observed else None

    def close(self) -> None:
        """Add the branch's outputs to the residual stream."""
        for i in range(len(self._hidden)):
            h = self._hidden[i]
            x = self._inner.pop(i, None)
            if x is None:
                x = self._now.advance(self._now.enter(h), i)
            self._hidden[i] = h.add_(self._now.close(x))

    def _entering(self, i: int) -> tuple[Tensor, Tensor | None]:
        """What the entry linears read, of this model and of the original."""
        x, x_0 = self._inputs.pop(i, None), self._inputs_0.pop(i, None)
        if x is None:
            x = self._now.enter(self._hidden[i])
        if x_0 is None and self._before is not None and self._original is not None:
            x_0 = self._before.enter(self._original[i])
        return x, x_0


@dataclass
class _Seen:
    """Sums over one part of the text: x xᵀ, and if something is owed, that times xᵀ, and x itself."""

    gram: Gram
    cross: Cross | None = None
    inputs: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All sums."""
        sums = (self.gram.total, self.cross.total if self.cross else None, self.inputs)
        return [each for each in sums if each is not None]


class _Watch:
    """What one group is to know about its inputs and, if the original model runs alongside, about what is owed to it.

    With `closing`, the owed outputs are seen without what that linear puts out by itself. That follows from the inputs:
    the mean of (W x + b) xᵀ is W H + b mean(x)ᵀ, which costs nothing beside computing W x for every token.
    """

    def __init__(self, share: Share, closing: nn.Linear | None = None) -> None:
        self._share, self._closing = share, closing
        self._pairs = Pairs()
        self._first: _Seen | None = None
        self._now: _Seen | None = None
        self._part = -1

    def see(self, chunk: int, x: Tensor, owed: Tensor | None) -> None:
        """One chunk: the inputs, and by how much inputs or outputs fall short of the original's."""
        with span("hessian"):
            now = self._seen(chunk, x)
            now.gram.add(x)
        if owed is None:
            return
        with span("drift"):
            now.cross = now.cross or Cross(owed.shape[-1], x.shape[-1], x.device)
            now.cross.add(owed, x)
            if self._closing is not None and self._closing.bias is not None:
                total = x.flatten(0, -2).sum(dim=0, dtype=torch.float32)
                now.inputs = total if now.inputs is None else now.inputs + total

    def _seen(self, chunk: int, x: Tensor) -> _Seen:
        """The sums of the part that the chunk belongs to."""
        if self._now is None or self._share.part_of[chunk] != self._part:
            self._end_part()
            self._part = self._share.part_of[chunk]
            self._now = _Seen(Gram(x.shape[-1], x.device))
            self._first = self._first or self._now
        return self._now

    def _end_part(self) -> None:
        if self._now is not None:
            self._pairs.add(self._now.tensors())
            self._now = None

    def _add_up(self, seen: _Seen) -> None:
        """What this process has seen, and then what all have: as much of it as each needs."""
        crew = self._share.crew
        self._pairs.total()
        crew.add_up(lower(seen.gram.total))
        if seen.cross is not None:
            crew.add_up_rows(seen.cross.total)
        if seen.inputs is not None:
            crew.add_up([seen.inputs])

    def hessian(self) -> Hessian:
        """All that was seen, by all processes."""
        seen, self._first = self._first, None
        assert seen is not None, "no activations"
        with span("hessian"):
            self._end_part()
            self._add_up(seen)
        gram, cross, inputs, self._pairs = seen.gram, seen.cross, seen.inputs, Pairs()
        gram.tokens = self._share.tokens
        del seen
        hessian = gram.hessian()
        del gram
        if cross is None:
            return hessian
        cross.tokens = self._share.tokens
        owed = cross.mean()
        del cross
        if self._closing is None:
            return Hessian(hessian.matrix, hessian.tokens, Drift(inputs=owed))
        with span("drift"):
            for rows in self._share.crew.rows(len(owed)):  # nobody needs the others
                weight = Parts.of(self._closing.weight[rows])
                for start in range(0, owed.shape[1], _PANEL):
                    panel = slice(start, start + _PANEL)
                    owed[rows, panel] -= product(weight, hessian.matrix[:, panel])
            if inputs is not None:
                owed -= torch.outer(self._closing.bias.float(), inputs / hessian.tokens)
        return Hessian(hessian.matrix, hessian.tokens, Drift(outputs=owed))
