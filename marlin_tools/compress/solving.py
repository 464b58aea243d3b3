"""How processes solve together: they share the rows of a group that all tokens go through, and of experts each solves its own.

An expert is small: cut into rows it would keep a GPU no shorter, so it stays whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from marlin_tools.algorithms.solution import Problem, Solution, slabs, solve_all
from marlin_tools.distributed.team import Team
from marlin_tools.stream.layer_stream import Group

Solve = Callable[[Group], Problem]
"""Makes a group ready to be solved, row by row."""


SolveAll = Callable[[list[Group]], list[Solution]]
"""Solves experts of one shape, each whole."""


def solve(
    batch: list[Group], problem_of: Solve, team: Team, all_at_once: SolveAll | None = None
) -> Iterator[tuple[Group, Solution]]:
    """Each group of a batch with its solution, the same in all processes."""
    if batch[0].tokens is None:
        (group,) = batch
        yield group, _shared(problem_of(group), group.stacked(), team)
        return
    rounds = [batch[start : start + team.size] for start in range(0, len(batch), team.size)]
    mine = [groups[team.own(groups)] for groups in rounds]
    solutions = all_at_once(mine) if all_at_once else [solve_all(problem_of(group), group.stacked()) for group in mine]
    n = sum(rows.stop - rows.start for _, rows in mine[0].rows())
    damps = team.each(torch.tensor([each.damp for each in solutions], dtype=torch.float64)).tolist()
    told = Solution.join(solutions).map(team.each)
    for i, groups in enumerate(rounds):
        for rank, group in enumerate(groups):
            place = rank * len(rounds) + i
            rows = slice(place * n, (place + 1) * n)
            yield group, replace(told.map(lambda whole, rows=rows: whole[rows]), damp=damps[place])  # type: ignore[misc]


def _shared(problem: Problem, weight: Tensor, team: Team) -> Solution:
    """One weight, of which each process solves some rows."""
    n, k = weight.shape
    own = [rows for part in team.rows(n) for rows in slabs(part, k, on_gpu=weight.is_cuda, size=problem.slab)]
    return Solution.join([problem.solve(weight[rows], rows) for rows in own]).map(lambda part: team.gather(part, n))
