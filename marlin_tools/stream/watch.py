"""What the linears of one group read, summed up over all calibration tokens and all processes: their Hessian."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import CrossGram, Drift, Gram, Hessian
from marlin_tools.distributed.team import Pairs, Team
from marlin_tools.ops.solver.products import Parts, lower, product
from marlin_tools.stopwatch import span

_PANEL = 4096
"""Columns of a product that are computed at a time; its right factor is cut in two, which takes twice its memory."""


@dataclass(frozen=True)
class TextShare:
    """This process's share of the text.

    team      all processes
    part_of   which part of the text each chunk belongs to
    tokens    how many tokens all processes have together
    """

    team: Team
    part_of: Sequence[int]
    tokens: int


@dataclass
class _Seen:
    """Sums over one part of the text: x xᵀ, and if something is owed, that times xᵀ, and x itself."""

    gram: Gram
    cross: CrossGram | None = None
    inputs: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All sums."""
        sums = (self.gram.total, self.cross.total if self.cross else None, self.inputs)
        return [each for each in sums if each is not None]


class Watch:
    """What one group is to know about its inputs and, if the original model runs alongside, about what is owed to it.

    With `closing`, the owed outputs are seen without what that linear puts out by itself. That follows from the inputs:
    the mean of (W x + b) xᵀ is W H + b mean(x)ᵀ, which costs nothing beside computing W x for every token.

    tokens   how many `see_some` has seen
    """

    def __init__(self, share: TextShare, closing: nn.Linear | None = None) -> None:
        self._share, self._closing = share, closing
        self.tokens = 0
        self._pairs = Pairs()
        self._first: _Seen | None = None
        self._now: _Seen | None = None
        self._part = -1

    def see(self, chunk: int, x: Tensor, owed: Tensor | None, weights: Tensor | None = None) -> None:
        """One chunk: the inputs, by how much inputs or outputs fall short of the original's, and by how much tokens count."""
        if weights is not None:
            weights = weights.to(x.dtype)
            x, owed = x * weights, None if owed is None else owed * weights
        with span("hessian"):
            now = self._seen(chunk, x)
            now.gram.add(x)
        if owed is None:
            return
        with span("drift"):
            now.cross = now.cross or CrossGram(owed.shape[-1], x.shape[-1], x.device)
            now.cross.add(owed, x)
            if self._closing is not None and self._closing.bias is not None:
                x = x if weights is None else x * weights  # its outputs are counted by as much as its inputs
                total = x.flatten(0, -2).sum(dim=0, dtype=torch.float32)
                now.inputs = total if now.inputs is None else now.inputs + total

    def see_some(self, chunk: int, x: Tensor, tokens: int) -> None:
        """Some tokens of a chunk, perhaps none, and perhaps zeros below them; to be told of every chunk."""
        self.tokens += tokens
        with span("hessian"):
            now = self._seen(chunk, x)
            if len(x):
                now.gram.add(x)

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

    def _sums(self) -> _Seen:
        """What this process has seen; nothing is left here."""
        seen, self._first = self._first, None
        assert seen is not None, "no activations"
        self._end_part()
        self._pairs.total()
        self._pairs = Pairs()
        return seen

    def _add_up(self, seen: _Seen) -> None:
        """What all processes have seen: as much of it as each needs."""
        team = self._share.team
        team.add_up(lower(seen.gram.total))
        if seen.cross is not None:
            team.add_up_rows(seen.cross.total)
        if seen.inputs is not None:
            team.add_up([seen.inputs])

    @staticmethod
    def own_hessian(watches: Sequence["Watch"]) -> Hessian:
        """Of experts, one for each process, whose `tokens` are those of all processes: what this process's own has seen."""
        team = watches[0]._share.team  # noqa: SLF001
        with span("hessian"):
            total = team.own_sum([watch._sums().gram.total for watch in watches])  # noqa: SLF001
            gram = Gram(0, total.device)
            gram.total, gram.tokens = total, watches[team.own(watches)].tokens
            return gram.hessian() if gram.tokens else Hessian(torch.eye(len(total), device=total.device), 0)

    def hessian(self) -> Hessian:
        """All that was seen, by all processes."""
        with span("hessian"):
            seen = self._sums()
            self._add_up(seen)
        gram, cross, inputs = seen.gram, seen.cross, seen.inputs
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
            for rows in self._share.team.rows(len(owed)):  # nobody needs the others
                weight = Parts.of(self._closing.weight[rows])
                for start in range(0, owed.shape[1], _PANEL):
                    panel = slice(start, start + _PANEL)
                    owed[rows, panel] -= product(weight, hessian.matrix[:, panel])
            if inputs is not None:
                owed -= torch.outer(self._closing.bias.float(), inputs / hessian.tokens)
        return Hessian(hessian.matrix, hessian.tokens, Drift(outputs=owed))
