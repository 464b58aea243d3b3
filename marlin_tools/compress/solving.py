"""How processes solve together: they share the rows of a group that all tokens go through, and of experts each solves its own.

An expert is small: cut into rows it would keep a GPU no shorter, so it stays whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from marlin_tools.algorithms.solution import Problem, Solution, slabs, solve_all
from marlin_tools.distributed.team import Team
from marlin_tools.stream.layer_stream import Group

Solve = Callable[[Group], Problem]
"""Makes a group ready to be solved, row by row."""


def solve(batch: list[Group], problem_of: Solve, team: Team) -> Iterator[tuple[Group, Solution]]:
    """Each group of a batch with its solution, the same in all processes."""
    mine = batch[team.own(batch)]
    problem, weight = problem_of(mine), mine.stacked()
    n, k = weight.shape
    if mine.tokens is None:
        own = [rows for part in team.rows(n) for rows in slabs(part, k, on_gpu=weight.is_cuda, size=problem.slab)]
        solution = Solution.join([problem.solve(weight[rows], rows) for rows in own])
        yield mine, solution.map(lambda part: team.gather(part, n))
        return
    solution = solve_all(problem, weight)
    assert solution.damp is not None, "experts are solved from data"
    damps = team.each(torch.tensor([solution.damp], dtype=torch.float64, device=weight.device)).tolist()
    told = solution.map(team.each)
    for number, group in enumerate(batch):
        rows = slice(number * n, (number + 1) * n)
        yield group, replace(told.map(lambda whole, rows=rows: whole[rows]), damp=damps[number])  # type: ignore[misc]
