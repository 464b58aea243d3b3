"""All calibration activations on their way through a mixture of experts, in three passes over the chunks.

    look at what gate and up of every expert read    ... which are then replaced
    look at what down of every expert reads          ... which is then replaced
    the outputs join the residual stream

An expert is calibrated on the tokens that the router sends to it and, so that rare experts are not starved, on one token in
`ALSO` of all text besides. Drift is not measured here; the original model's activations go through the original experts.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from marlin_tools.families.experts import SplitExperts
from marlin_tools.families.family import Branch, Experts
from marlin_tools.stopwatch import span
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.branch import Flow, Observation, Path, Wanted
from marlin_tools.stream.watch import Watch

ALSO = 64
"""One token in so many goes to every expert that is calibrated, whatever the router says."""

TOGETHER = 16
"""Experts that each process is handed at a time."""

_TOGETHER_BYTES = {"cuda": 128 << 20, "cpu": 0}
"""What chunks that go through at once may take, as the residual stream has them, where there is more than one."""

_MEMORY_SHARE = 0.25
_HOST_BYTES = 8 << 30
"""What the Hessians of experts may take at a time: of a GPU's memory, and on a CPU."""


class RoutedWalk:
    """See the top of this file. `now` is the block with the weights that it has by now, `before` that of the original model."""

    def __init__(self, branch: Branch, now: nn.Module, before: nn.Module | None, flow: Flow) -> None:
        assert branch.experts is not None
        self._flow, self._spec = flow, branch.experts
        self._now = Path(now, branch, flow)
        self._before = Path(before, branch, flow) if before is not None else None
        experts = self._now.body.get_submodule("experts")
        assert isinstance(experts, SplitExperts)
        self._experts = experts
        self._steps = branch.steps(experts.count)

    def steps(self, wanted: Wanted) -> Iterator[list[Observation]]:
        """Groups after groups, experts by the dozen; to be exhausted, so that the activations are past the branch."""
        for step in self._steps:
            groups = [names for names in step if wanted(names)]
            for batch in self._batches(groups):
                with span("forward"):
                    watches = {names: Watch(self._flow.share) for names in batch}
                    sent = self._look(watches)
                for names in self._rounds(batch, wanted):
                    yield self._observed({each: watches.pop(each) for each in names}, sent)
        with span("forward"):
            self._close()

    def _rounds(self, groups: list[tuple[str, ...]], wanted: Wanted) -> list[list[tuple[str, ...]]]:
        """Experts of one shape, some for each process; what all tokens go through stays alone, as processes share its rows."""
        rounds: list[list[tuple[str, ...]]] = []
        like = None
        for names in groups:
            alone, this = _number(self._spec, names[0]) is None, wanted(names)
            if alone or this != like or len(rounds[-1]) == TOGETHER * self._flow.share.team.size:
                rounds.append([])
            rounds[-1].append(names)
            like = None if alone else this
        return rounds

    def _observed(self, watches: dict[tuple[str, ...], Watch], sent: list[int]) -> list[Observation]:
        """What was seen of the groups of one round; of experts, only what this process solves."""
        groups, seen = list(watches), list(watches.values())
        watches.clear()
        if _number(self._spec, groups[0][0]) is None:
            return [Observation(groups[0], seen.pop().hessian())]
        found, team = [], self._flow.share.team
        for names, watch in zip(groups, seen, strict=True):
            number = _number(self._spec, names[0])
            assert number is not None, names
            found.append(Observation(names, None, (sent[number], watch.tokens)))
        for start in range(0, len(seen), team.size):
            one_each = seen[start : start + team.size]
            mine = start + team.own(one_each)
            found[mine] = replace(found[mine], hessian=Watch.own_hessian(one_each))
        return found

    def _batches(self, groups: list[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
        """As many groups at a time as there is memory for their Hessians."""
        room = hessians_room(next(self._experts.parameters()).device, cuts=self._flow.share.team.cuts)
        while groups:
            count, left = 0, room
            while count < len(groups) and (count == 0 or left > 0):
                inputs = self._linear(groups[count][0]).in_features
                left -= 4 * inputs * inputs
                count += 1
            yield groups[:count]
            groups = groups[count:]

    def _linear(self, name: str) -> nn.Linear:
        linear = self._now.body.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        return linear

    def _look(self, watches: dict[tuple[str, ...], Watch]) -> list[int]:
        """Let these watches see what their groups read; how many tokens were sent to each expert."""
        groups = list(watches)
        numbers = {names: _number(self._spec, names[0]) for names in groups}
        routed = torch.zeros(self._experts.count, dtype=torch.float64, device=next(self._experts.parameters()).device)
        through = [names[0] for names in groups if numbers[names] is None]
        for chunks in self._together():
            i, x = chunks[0], self._now.enter(_joined(self._flow.hidden, chunks))
            also = torch.arange(x.shape[1], device=x.device).remainder(ALSO).eq(0).repeat(x.shape[0])

            def look(tokens: Tensor, chosen: Tensor, weights: Tensor, i: int = i, also: Tensor = also) -> None:
                routed.add_(torch.bincount(chosen.flatten(), minlength=len(routed)))
                rows, counts = _rows(chosen, also, self._experts.count)
                wanted = {number: names for names, number in numbers.items() if number is not None}
                for bundle, own in self._experts.handed_out(rows, counts, wanted):
                    x = self._read(wanted[bundle[0]][0], bundle, own, tokens, (chosen, weights))
                    for number, each in zip(bundle, x, strict=True):
                        each[counts[number] :] = 0
                        watches[wanted[number]].see_some(i, each, counts[number])

            self._experts.look = look
            try:
                seen = self._through(x, i, through)
            finally:
                self._experts.look = None
            for names in groups:
                if numbers[names] is None:
                    watches[names].see(i, seen[names[0]], None)
        counts = torch.cat([routed, routed.new_tensor([watch.tokens for watch in watches.values()])])
        self._flow.share.team.add_up([counts])
        told = [int(count) for count in counts.tolist()]
        for watch, count in zip(watches.values(), told[len(routed) :], strict=True):
            watch.tokens = count
        return told[: len(routed)]

    def _through(self, x: Tensor, i: int, names: list[str]) -> dict[str, Tensor]:
        """The whole body, and what these linears, which all tokens go through, read on the way."""
        seen: dict[str, Tensor] = {}
        handles = []
        for name in names:

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = args[0]

            handles.append(self._linear(name).register_forward_pre_hook(hook))
        try:
            self._now.compute(x, i)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _read(self, name: str, numbers: list[int], own: Tensor, tokens: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
        """What linears like this one read of these rows of a chunk, some for each expert: [experts, rows, K]."""
        x = tokens[own]
        if self._experts.scales_inputs:
            chosen, weights = routing
            called = chosen[own] == torch.tensor(numbers, device=own.device)[:, None, None]
            weight = torch.where(called, weights[own], 0).sum(dim=-1, keepdim=True)
            x = x * torch.where(weight > 0, weight, weights.mean())
        return x if name.endswith((".gate_proj", ".up_proj")) else self._experts.gated(numbers, x)

    def _together(self) -> list[list[int]]:
        """Chunks that go through at once. A GPU takes longer to start kernels than to compute few tokens of each expert."""
        hidden, part_of = self._flow.hidden, self._flow.share.part_of
        bundles: list[list[int]] = []
        like, room = None, 0
        for i, shape in enumerate(hidden.shapes()):
            size = math.prod(shape) * next(self._experts.parameters()).element_size()
            if bundles and room >= size and like == (shape, part_of[i]):
                bundles[-1].append(i)
            else:
                bundles.append([i])
                like, room = (shape, part_of[i]), _TOGETHER_BYTES[hidden.device.type]
            room -= size
        return bundles

    def _close(self) -> None:
        """Add the branch's outputs to the residual stream, and the original's to its own."""
        flows = ((self._now, self._flow.hidden), (self._before, self._flow.original))
        for path, hidden in flows:
            if path is None or hidden is None:
                continue
            for chunks in self._together():
                out = path.join(path.compute(path.enter(_joined(hidden, chunks)), chunks[0]))
                for i, part in zip(chunks, out.split(len(out) // len(chunks)), strict=True):
                    hidden[i] = hidden[i].add_(part)


def hessians_room(device: torch.device, *, cuts: bool) -> int:
    """Bytes that the Hessians of experts may take at a time; `cuts`: sums of several parts of the text wait for each other."""
    room = _HOST_BYTES
    if device.type == "cuda":
        room = int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[1])
    return room // 4 if cuts else room


def _joined(hidden: Activations, chunks: list[int]) -> Tensor:
    """Some chunks as one."""
    return hidden[chunks[0]] if len(chunks) == 1 else torch.cat([hidden[i] for i in chunks])


def _number(experts: Experts, name: str) -> int | None:
    """Which expert a linear belongs to; None for the one that all tokens go through."""
    if experts.shared is not None and name.startswith(f"{experts.shared}."):
        return None
    return int(name.removeprefix("experts.").split(".")[0])


def _rows(chosen: Tensor, also: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The rows of a chunk that each expert is calibrated on, one expert after the other, and how many each has."""
    mine = torch.zeros(count, len(chosen), dtype=torch.bool, device=chosen.device).scatter_(0, chosen.T, value=True)
    mine |= also
    return mine.nonzero()[:, 1], mine.sum(dim=1).tolist()
