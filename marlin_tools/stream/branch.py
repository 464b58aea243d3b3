"""All calibration activations on their way through one branch of a block, in three passes over the chunks.

    enter      what the entry linears read        ... which are then replaced
    advance    what the closing linear reads      ... which is then replaced
    close      the branch's outputs join the residual stream

The original model's activations, if they flow alongside, go through the original weights in step and wait for nobody: what they
are inside the branch is seen once, chunk by chunk. Linears between entry and exit, if there are any, cost a pass of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.families.family import Branch
from marlin_tools.stopwatch import span
from marlin_tools.stream.activations import Activations, MemoryBudget
from marlin_tools.stream.token_weights import token_weights
from marlin_tools.stream.watch import TextShare, Watch

Wanted = Callable[[tuple[str, ...]], int]
"""How many linears of a group, by their names in the body, are to be observed."""


@dataclass(frozen=True)
class Observation:
    """Linears of a branch that read one tensor, and what that looks like. Before they are replaced, nothing after them is read.

    hessian   None if nobody wanted it, or if another process solves this expert
    routed    how many tokens were sent to this expert, and how many it has seen; None for linears that see all
    """

    names: tuple[str, ...]
    hessian: Hessian | None
    routed: tuple[int, int] | None = None


@dataclass(frozen=True)
class Flow:
    """What the branches of a block have in common.

    hidden     the residual stream
    original   that of the original model, if it is wanted
    contexts   what the block is called with besides them, chunk by chunk
    room       what stays on the device
    share      whose the chunks are
    drift      whether groups are to know how far they are from the original
    multiple   what joins the residual stream is multiplied by this
    """

    hidden: Activations
    original: Activations | None
    contexts: Sequence[dict[str, Any]]
    room: MemoryBudget
    share: TextShare
    drift: bool = False
    multiple: float = 1.0


class Path:
    """The way of one model's activations through one branch."""

    def __init__(self, block: nn.Module, branch: Branch, flow: Flow) -> None:
        self.enter = block.get_submodule(branch.pre) if branch.pre else nn.Identity()
        self._post = block.get_submodule(branch.post) if branch.post else nn.Identity()
        self.body, self._branch = block.get_submodule(branch.body), branch
        self._into = 1.0 if branch.into is None else float(getattr(block, branch.into))
        self._multiple = flow.multiple * (1.0 if branch.out is None else float(getattr(block, branch.out)))
        self._calls = _calls(block, self.body, flow) if branch.attends else None

    @property
    def closing(self) -> nn.Linear:
        """The linear that closes the branch."""
        closing = self.body.get_submodule(self._branch.exit)
        assert isinstance(closing, nn.Linear), self._branch.exit
        return closing

    def advance(self, x: Tensor, chunk: int) -> Tensor:
        """What the closing linear reads: the body with its closing linear bypassed."""
        closing = self.closing
        setattr(self.body, self._branch.exit, nn.Identity())
        try:
            return self.compute(x, chunk)
        finally:
            setattr(self.body, self._branch.exit, closing)

    def compute(self, x: Tensor, chunk: int) -> Tensor:
        """The whole body."""
        return torch.cat([self._of(part, chunk) for part in x.split(1)]) if self._branch.apart else self._of(x, chunk)

    def _of(self, x: Tensor, chunk: int) -> Tensor:
        x = x if self._into == 1 else x * self._into
        out = self.body(x) if self._calls is None else self.body(hidden_states=x, **self._calls[chunk])
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        return out.view(*x.shape[:-1], out.shape[-1])

    def close(self, x: Tensor) -> Tensor:
        """The branch's output, which is added to the residual stream, from what the closing linear reads."""
        return self.join(self.closing(x))

    def join(self, x: Tensor) -> Tensor:
        """The same, from what the body puts out."""
        output: Tensor = self._post(x)
        return output if self._multiple == 1 else output * self._multiple

    def inside(self, x: Tensor, chunk: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What these linears of the body read; as much is computed as that takes."""
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name] = args[0]
                if len(seen) == len(names):
                    raise _EnoughError

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.callback(self.body.get_submodule(name).register_forward_pre_hook(look(name)).remove)
            with suppress(_EnoughError):
                self.compute(x, chunk)
        return seen


class BranchWalk:
    """See the top of this file. `now` is the block with the weights that it has by now, `before` that of the original model.

    `reads` are the activations that the branch reads, of this model and of the original, if they are not those it is added to.
    """

    def __init__(
        self,
        branch: Branch,
        now: nn.Module,
        before: nn.Module | None,
        flow: Flow,
        reads: tuple[Activations, Activations | None] | None = None,
    ) -> None:
        self._branch, self._flow = branch, flow
        self._room, self._hidden, self._original, self._share = flow.room, flow.hidden, flow.original, flow.share
        self._reads, self._reads_0 = reads or (flow.hidden, flow.original)
        self._drift = flow.drift and before is not None
        self._joins = branch.post is None and branch.out is None and flow.multiple == 1
        self._now = Path(now, branch, flow)
        self._before = Path(before, branch, flow) if before is not None else None
        self._inputs: dict[int, Tensor] = {}
        self._inputs_0: dict[int, Tensor] = {}
        self._inner: dict[int, Tensor] = {}

    def steps(self, wanted: Wanted) -> Iterator[list[Observation]]:
        """Group after group; to be exhausted, so that the activations are past the branch."""
        branch = self._branch
        with span("forward"):
            hessian = self.enter(observed=bool(wanted(branch.entry)))
        yield [Observation(branch.entry, hessian)]
        del hessian
        if inner := [name for name in branch.inner if wanted((name,))]:
            with span("forward"):
                hessians = self.between(inner)
            for name in inner:
                yield [Observation((name,), hessians.pop(name))]
        with span("forward"):
            hessian = self.advance(observed=bool(wanted((branch.exit,))))
        yield [Observation((branch.exit,), hessian)]
        del hessian
        with span("forward"):
            self.close()

    def enter(self, *, observed: bool) -> Hessian | None:
        """Look at what the entry linears read."""
        watch = Watch(self._share)
        if not observed:
            return None
        for i in range(len(self._hidden)):
            x, x_0 = self._entering(i)
            watch.see(i, x, self._short(x, x_0))
            if self._room.inputs:
                self._keep(i, x, x_0)
        return watch.hessian()

    def between(self, names: Sequence[str]) -> dict[str, Hessian]:
        """Look at what linears between entry and exit read."""
        watches = {name: Watch(self._share) for name in names}
        for i in range(len(self._hidden)):
            x, x_0 = self._entering(i)
            seen = self._now.inside(x, i, names)
            seen_0 = self._before.inside(x_0, i, names) if self._before is not None and x_0 is not None else None
            for name, watch in watches.items():
                watch.see(i, seen[name], self._short(seen[name], None if seen_0 is None else seen_0[name]))
            if self._room.inputs:
                self._keep(i, x, x_0)
        return {name: watch.hessian() for name, watch in watches.items()}

    def advance(self, *, observed: bool) -> Hessian | None:
        """Compute what the closing linear reads, and move the original model's activations past the branch."""
        closing = self._now.closing if self._joins and self._drift else None
        watch, left = Watch(self._share, closing), self._room.inner
        for i in range(len(self._hidden)):
            x, x_0 = self._entering(i)
            x = self._now.advance(x, i)
            if x.nbytes <= left:
                self._inner[i], left = x, left - x.nbytes
            owed = weights = None
            if self._before is not None and self._original is not None and x_0 is not None:
                x_0 = self._before.advance(x_0, i)
                out_0, h_0 = self._before.close(x_0), self._original[i]
                if observed:
                    owed = (h_0 - self._hidden[i]).add_(out_0) if closing is not None else self._short(x, x_0)
                self._original[i] = h_0 = h_0.add_(out_0)
                weights = token_weights(h_0) if observed and self._drift else None
            if observed:
                watch.see(i, x, owed, weights)
        return watch.hessian() if observed else None

    def close(self) -> None:
        """Add the branch's outputs to the residual stream."""
        for i in range(len(self._hidden)):
            h = self._hidden[i]
            x = self._inner.pop(i, None)
            if x is None:
                x = self._now.advance(self._now.enter(self._reads[i]), i)
            self._hidden[i] = h.add_(self._now.close(x))

    def _short(self, x: Tensor, x_0: Tensor | None) -> Tensor | None:
        """By how much inputs fall short of the original's, if that is wanted."""
        return x_0 - x if self._drift and x_0 is not None else None

    def _keep(self, i: int, x: Tensor, x_0: Tensor | None) -> None:
        self._inputs[i] = x
        if x_0 is not None:
            self._inputs_0[i] = x_0

    def _entering(self, i: int) -> tuple[Tensor, Tensor | None]:
        """What the entry linears read, of this model and of the original."""
        x, x_0 = self._inputs.pop(i, None), self._inputs_0.pop(i, None)
        if x is None:
            x = self._now.enter(self._reads[i])
        if x_0 is None and self._before is not None and self._reads_0 is not None:
            x_0 = self._before.enter(self._reads_0[i])
        return x, x_0


class _EnoughError(BaseException):
    """All that was to be seen has been seen."""


def _calls(block: nn.Module, body: nn.Module, flow: Flow) -> list[dict[str, Any]]:
    """What the block calls its attention with besides activations, chunk by chunk: seen while it does so, not rebuilt."""
    calls: dict[tuple[int, ...], dict[str, Any]] = {}
    shapes = flow.hidden.shapes()
    for chunk, shape in enumerate(shapes):
        if shape in calls:
            continue

        def look(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any], shape: tuple[int, ...] = shape) -> None:
            calls[shape] = {key: value for key, value in named.items() if key != "hidden_states"}
            raise _EnoughError

        handle = body.register_forward_pre_hook(look, with_kwargs=True)
        weight = next(body.parameters())
        with handle, suppress(_EnoughError):
            block(torch.zeros(shape, dtype=weight.dtype, device=weight.device), **flow.contexts[chunk])
    return [calls[shape] for shape in shapes]
