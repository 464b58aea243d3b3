"""How linears that are handed out together are solved, and what comes of it.

Of one group processes share the rows. Of experts each process solves its own: an expert is small, and cut into rows it would
keep a GPU no shorter. A mixture has hundreds of linears in a block, so what is done to each of them afterwards is done to many
at once: Python starts kernels more slowly than a GPU runs such small ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlin_tools.algorithms.solution import Problem, Solution, slabs, solve_all
from marlin_tools.distributed.team import Team
from marlin_tools.stream.layer_stream import Group

Solve = Callable[[Group], Problem]
"""Makes a group ready to be solved, row by row."""

SolveAll = Callable[[list[Group]], list[Solution]]
"""Solves experts of one shape, each whole."""

_AT_ONCE = 1 << 24
"""Weights of several linears, at most, that something is done to at once."""


@dataclass(frozen=True)
class Solved:
    """Linears that were solved together: the rows of all are in one solution.

    rows    where those of each linear are
    damps   the damping really used for each
    """

    whole: Solution
    rows: Mapping[str, slice]
    damps: Mapping[str, float | None]

    @classmethod
    def of(cls, name: str, solution: Solution) -> "Solved":
        """One linear."""
        return cls(solution, {name: slice(0, len(solution.losses.weight))}, {name: solution.damp})

    @classmethod
    def of_group(cls, group: Group, parts: Sequence[Solution], team: Team) -> "Solved":
        """A group of which this process has solved its own rows."""
        n = sum(rows.stop - rows.start for _, rows in group.rows())
        whole = Solution.join(parts).map(lambda own: team.gather(own, n))
        return cls(whole, dict(group.rows()), dict.fromkeys(group.names, whole.damp))

    def each(self) -> Iterator[tuple[str, Solution]]:
        """The solution of every linear."""
        for name, rows in self.rows.items():
            yield name, replace(self.whole[rows], damp=self.damps[name])

    def pieces(self) -> Iterator[tuple[Solution, dict[str, slice]]]:
        """Some neighbours at a time, and where in that solution each of them is."""
        piece: list[tuple[str, slice]] = []
        k = self.whole.weight.shape[1]
        for name, rows in sorted(self.rows.items(), key=lambda each: each[1].start):
            if piece and (rows.stop - piece[0][1].start) * k > _AT_ONCE:
                yield self._piece(piece)
                piece = []
            piece.append((name, rows))
        yield self._piece(piece)

    def values(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The weight of every linear to compute with."""
        for piece, places in self.pieces():
            value = piece.value(dtype)
            for name, rows in places.items():
                yield name, value[rows]

    def errors(self) -> dict[str, tuple[float | None, float]]:
        """What each linear lost of its output, if that is known, and of its weight; a GPU is waited for once."""
        by_row = self.whole.losses.by_row()
        sums = torch.stack([by_row[rows].sum(dim=0) for rows in self.rows.values()]).tolist()
        return {name: Solution.lost(each) for name, each in zip(self.rows, sums, strict=True)}

    def _piece(self, linears: Sequence[tuple[str, slice]]) -> tuple[Solution, dict[str, slice]]:
        start, stop = linears[0][1].start, linears[-1][1].stop
        return self.whole[start:stop], {name: slice(rows.start - start, rows.stop - start) for name, rows in linears}


def own_rows(problem: Problem, weight_nk: Tensor, team: Team) -> list[slice]:
    """The rows of a group that this process solves, in pieces that a GPU can work on."""
    n, k = weight_nk.shape
    return [piece for own in team.rows(n) for piece in slabs(own, k, on_gpu=weight_nk.is_cuda, size=problem.slab)]


def solve_experts(batch: list[Group], problem_of: Solve, team: Team, at_once: SolveAll | None = None) -> Solved:
    """Experts of one shape; every process solves those whose Hessians it has."""
    rounds = [batch[start : start + team.size] for start in range(0, len(batch), team.size)]
    mine = [groups[team.own(groups)] for groups in rounds]
    solutions = at_once(mine) if at_once else [solve_all(problem_of(group), group.stacked()) for group in mine]
    n = len(solutions[0].losses.weight)
    used = team.each(torch.tensor([each.damp for each in solutions], dtype=torch.float64)).tolist()
    rows, damps = dict[str, slice](), dict[str, float | None]()
    for i, groups in enumerate(rounds):
        for rank, group in enumerate(groups):
            place = rank * len(rounds) + i
            for name, own in group.rows():
                rows[name] = slice(place * n + own.start, place * n + own.stop)
                damps[name] = used[place]
    return Solved(Solution.join(solutions).map(team.each), rows, damps)
