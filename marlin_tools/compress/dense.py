"""Which linears stay dense INT4 when all others become 2:4: those that 2:4 costs most, within a share of the weights.

It is found out in a pass of its own before the real one, on the first windows of the calibration text. The original model flows
by, and in each block one unit after the other is replaced, first by its dense INT4, then by its 2:4 INT4; all else stays the
original. A unit is what engines multiply in one product: q, k and v, gate and up, the same linear of all experts. Its price is

    mean over tokens of |h - h_original|² / |h_original|²    h: what the block puts out

with 2:4 less without, for each weight. The highest prices are paid first, as long as the share lasts. Errors of all units are
measured in the same place, the residual stream, so they can be compared. Every token counts by its own length, because that is
what the next norm sees: a first token that is a thousand times as long as the others would decide everything.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import PlainValidator, WithJsonSchema
from torch import Tensor

from marlin_tools.algorithms.solution import Problem
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.compress.naming import naming
from marlin_tools.compress.solved import Solve, Solved, own_rows, solve_experts
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.team import Pairs, Team
from marlin_tools.errors import FormatError, RecipeError
from marlin_tools.events import Emit, Event
from marlin_tools.formats import FORMATS
from marlin_tools.quantized import is_2_4
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.inventory import Inventory
from marlin_tools.stream.layer_stream import Block, Group, LayerStream

LOOKED_AT = 65_536
"""Calibration tokens that the choice is made from, in whole windows."""

_STATE = "dense.json"


def _known_share(share: object) -> object:
    """A number, also as people type it."""
    number = share
    if isinstance(share, str) and (found := re.fullmatch(r"(\d{0,2}\.?\d{1,9})(%?)", share.strip())):
        number = float(found[1]) / (100 if found[2] else 1)
    if isinstance(number, float) and 0 < number < 1:
        return number
    raise ValueError("it is a share of the weights above 0 and below 100%, such as 10% or 0.1")


Share = Annotated[float, PlainValidator(_known_share), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]})]
"""A part of the weights, more than none and less than all."""


@dataclass(frozen=True)
class Unit:
    """Linears that stay dense together or not at all.

    dense, sparse   error of the block's output with the unit in dense and in 2:4 INT4
    """

    linears: tuple[str, ...]
    weights: int
    dense: float
    sparse: float

    @property
    def price(self) -> float:
        """What 2:4 costs each weight of it."""
        return (self.sparse - self.dense) / self.weights


def choose(units: Sequence[Unit], room: int) -> list[Unit]:
    """Those that stay dense, the dearest first; together they have at most `room` weights."""
    chosen = []
    for unit in sorted(units, key=lambda each: -each.price):
        if unit.price > 0 and unit.weights <= room:
            chosen.append(unit)
            room -= unit.weights
    return chosen


def check_dense(sparsity: str | None, formats: Sequence[str], *, needs_data: bool) -> None:
    """Refuse what leaves nothing to choose, and formats that hold 2:4 linears only."""
    if sparsity != "2:4":
        raise RecipeError("`keep_dense` chooses what `sparsity: 2:4` leaves dense", hint="add `--sparsity 2:4`")
    if not needs_data:
        raise RecipeError(
            "round-to-nearest looks at no data, what 2:4 costs is measured on some", hint="choose another `--preset`"
        )
    for name in formats:
        if reason := FORMATS[name].limits(256, 256, 128, sparse=False):  # a shape that every format knows
            raise FormatError(
                f"format `{name}` cannot hold the linears that stay dense: {reason}",
                hint="use `--format compressed-tensors`, or leave out `--keep-dense`",
            )


def check_room(share: float, inventory: Inventory) -> None:
    """Refuse a share in which no unit has room."""
    sizes = {target.name: target.n * target.k for target in inventory.targets}
    units: dict[str, int] = {}
    for index in range(inventory.blocks):
        for group in inventory.layout.groups(index):
            names = [linear for name in group if (linear := inventory.layout.linear(index, name)) in sizes]
            if names:
                units[_unit(names)] = units.get(_unit(names), 0) + sum(sizes[name] for name in names)
    least, weights = min(units.values()), sum(sizes.values())
    if int(share * weights) < least:
        raise RecipeError(
            f"`keep_dense` has room for {share * weights:,.0f} weights, too few for any linear: the smallest has {least:,}",
            hint=f"use `--keep-dense {math.floor(1e6 * least / weights + 1) / 1e4:g}%` or more, or leave it out",
        )


class DenseChoice:
    """The choice for one run; `names` is empty until it is made.

    share   of all quantised weights, at most, may stay dense
    ways    how a group is solved dense, and how 2:4
    facts   what the manifest says about it
    """

    def __init__(self, share: float, ways: tuple[Solve, Solve], inventory: Inventory) -> None:
        self.share, self._ways, self._inventory = share, ways, inventory
        self.names: frozenset[str] = frozenset()
        self.facts: dict[str, Any] = {}

    def make(
        self,
        tokens: TokenSet,
        stream_of: Callable[[TokenSet], LayerStream],
        output: OutputDirectory,
        team: Team,
        emit: Emit,
    ) -> None:
        """Measure and choose, or take what an interrupted run has chosen; afterwards the same in all processes."""
        if self.facts:
            return
        saved = output.state / _STATE
        if not team.decide(choice=saved.is_file()):
            seen = tokens.first(LOOKED_AT, 8)  # eight processes may share it
            units = list(_measured(stream_of(seen), self._ways, team, emit))
            if team.leads:
                facts = {"tokens": seen.tokens, "units": [asdict(unit) for unit in units]}
                output.write_state(_STATE, json.dumps(facts))
        targets = self._inventory.targets
        flags = torch.zeros(len(targets), dtype=torch.uint8)
        if team.leads:
            facts = json.loads(saved.read_text(encoding="utf-8"))
            units = [Unit(**{**each, "linears": tuple(each["linears"])}) for each in facts["units"]]
            weights = sum(target.n * target.k for target in targets)
            chosen = choose(units, int(self.share * weights))
            names = {name for unit in chosen for name in unit.linears}
            flags = torch.tensor([target.name in names for target in targets], dtype=torch.uint8)
            kept = [target.name for target in targets if target.name in names]
            self.facts = {"share": sum(unit.weights for unit in chosen) / weights, "linears": kept, **facts}
            emit(Event("note", f"{len(names)} linears stay dense, {self.facts['share']:.1%} of the weights"))
        team.tell(flags, 0)
        self.names = frozenset(target.name for target, flag in zip(targets, flags.tolist(), strict=True) if flag)
        self.facts = self.facts or {"share": self.share}


def _measured(stream: LayerStream, ways: tuple[Solve, Solve], team: Team, emit: Emit) -> Iterator[Unit]:
    """All units, block by block. The activations go on as the original model has them."""
    assert stream.hidden is not None, "nothing to measure with"
    with torch.no_grad():
        for block in stream:
            entering = stream.hidden.copy()
            units = _solved(block, ways, team)
            leaving = stream.hidden.copy()
            for names, versions in units.items():
                errors = [_error(block, entering, leaving, version, team) for version in versions]
                weights = sum(weight.numel() for weight in versions[0].values())
                yield Unit(names, weights, *(float(f"{error:.6g}") for error in errors))
            for i, chunk in enumerate(leaving):
                stream.hidden[i] = chunk
            emit(Event("progress", "blocks, to see what 2:4 costs", block.index + 1, len(stream)))


Version = dict[str, Tensor]
"""New weights by name."""


def _solved(block: Block, ways: tuple[Solve, Solve], team: Team) -> dict[tuple[str, ...], tuple[Version, Version]]:
    """Every unit of a block dense and 2:4, by its linears. Those that are 2:4 already stay so, and are left out."""
    found: dict[str, tuple[Version, Version]] = {}
    for batch in block.batches():
        todo = {group.names for group in batch if not all(is_2_4(group.weight(name)) for name in group.names)}
        for number, way in enumerate(ways if todo else ()):
            with naming(batch):
                solved = solve_experts(batch, way, team) if batch[0].tokens else _solve(batch[0], way(batch[0]), team)
            weights = dict(solved.values(batch[0].weight(batch[0].names[0]).dtype))
            for group in batch:
                if group.names in todo:
                    version = found.setdefault(_unit(group.names), ({}, {}))[number]
                    version.update((name, weights[name]) for name in group.names)
    return {tuple(versions[0]): versions for versions in found.values()}


def _unit(names: Sequence[str]) -> str:
    """The same for the same linears of all experts."""
    return " ".join(re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in names)


def _solve(group: Group, problem: Problem, team: Team) -> Solved:
    """As the loop does."""
    weight = group.stacked()
    return Solved.of_group(group, [problem.solve(weight[rows], rows) for rows in own_rows(problem, weight, team)], team)


def _error(block: Block, entering: Activations, leaving: Activations, version: Version, team: Team) -> float:
    """What the block's output loses with these weights, token by token; the block has its own weights again in the end."""
    linears = block.linears()
    own = {name: linears[name].weight.data.clone() for name in version}
    for name, weight in version.items():
        linears[name].weight.data.copy_(weight)
    block.rerun(entering)
    for name, weight in own.items():
        linears[name].weight.data.copy_(weight)
    hidden, share = block.stream.hidden, block.stream.share
    assert hidden is not None, "nothing to measure with"
    sums: dict[int, Tensor] = {}
    for part, new, old in zip(share.part_of, hidden, leaving, strict=True):
        energy = old.float().square().sum(dim=-1).clamp_(min=torch.finfo(torch.float32).tiny)
        lost = ((new.float() - old.float()).square().sum(dim=-1) / energy).sum(dtype=torch.float64).view(1)
        sums[part] = sums[part] + lost if part in sums else lost
    pairs = Pairs()
    for lost in sums.values():
        pairs.add([lost])
    (total,) = pairs.total()
    team.add_up([total])
    return float(total) / share.tokens
