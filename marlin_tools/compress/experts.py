"""How experts are solved: of some that are handed out together, each process of a team solves its own.

An expert is small: cut into rows, as other linears are, it would keep a GPU no shorter, so it stays whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from marlin_tools.algorithms.solution import Problem, Solution, solve_all
from marlin_tools.distributed.team import Team
from marlin_tools.stream.layer_stream import Group

Solve = Callable[[Group], Problem]
"""Makes a group ready to be solved, row by row."""

SolveAll = Callable[[list[Group]], list[Solution]]
"""Solves experts of one shape, each whole."""


def solve_experts(
    batch: list[Group], problem_of: Solve, team: Team, at_once: SolveAll | None = None
) -> Iterator[tuple[Group, Solution]]:
    """Each expert of a batch with its solution; every process solves those whose Hessian it has."""
    rounds = [batch[start : start + team.size] for start in range(0, len(batch), team.size)]
    mine = [groups[team.own(groups)] for groups in rounds]
    solutions = at_once(mine) if at_once else [solve_all(problem_of(group), group.stacked()) for group in mine]
    n = sum(rows.stop - rows.start for _, rows in mine[0].rows())
    damps = team.each(torch.tensor([each.damp for each in solutions], dtype=torch.float64)).tolist()
    told = Solution.join(solutions).map(team.each)
    for i, groups in enumerate(rounds):
        for rank, group in enumerate(groups):
            place = rank * len(rounds) + i
            rows = slice(place * n, (place + 1) * n)
            yield group, replace(told.map(lambda whole, rows=rows: whole[rows]), damp=damps[place])  # type: ignore[misc]
