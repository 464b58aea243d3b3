"""The loop: for each block, for each group of linears that read the same tensor, solve, replace, write.

Blocks stream by. Each group is solved against the Hessian of what it really reads, the stream goes on with the new weights, and
the block is on disk before the next one is loaded. What is done to a group is a `Method`, how its linears are stored a `Store`;
`job.py` makes a model directory of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_tools.algorithms.solution import Solution, finite, slabs
from marlin_tools.compress.dense import DenseChoice
from marlin_tools.compress.experts import Solve, SolveAll, solve_experts
from marlin_tools.compress.naming import naming
from marlin_tools.compress.shards import Shards
from marlin_tools.distributed.team import Team
from marlin_tools.events import Emit, Event
from marlin_tools.stopwatch import span
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.background import Background
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Block, Group, LayerStream

Refine = Callable[[Block, Activations, dict[str, Solution]], tuple[dict[str, Solution], dict[str, Any]]]
"""(a solved block, what it reads, its solutions) -> better ones, and what the record of each says about it."""


@dataclass(frozen=True)
class Method:
    """What is done to the linears.

    problem   makes a group ready to be solved, row by row
    experts   solves many experts at once, if there is a faster way than one after the other
    before    looks at groups that are going to be solved, here or by another process
    staged    later groups of a block see the new outputs of earlier ones
    note      what the record of a linear says besides
    refine    what is left to do once all groups of a block are solved
    dense     the choice of linears that stay dense, to be made before the first block
    chunk     tokens that go through a block at a time
    """

    problem: Solve
    experts: SolveAll | None = None
    before: Callable[[list[Group]], None] = lambda _batch: None
    staged: bool = True
    note: Callable[[str, Solution], dict[str, Any]] = lambda _name, _solution: {}
    refine: Refine | None = None
    dense: DenseChoice | None = None
    chunk: int = CHUNK_TOKENS


class Store(Protocol):
    """How the linears are stored; `suffixes` are the tensors of each.

    `joins` says whether experts that lie in one tensor do so afterwards, too.
    """

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of a linear's tensors end with."""

    @property
    def joins(self) -> bool:
        """See above."""

    def tensors(self, name: str, solution: Solution) -> dict[str, Tensor]:
        """What is written, by suffix."""

    def weight(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """The weight that these tensors stand for; `like` is what it replaces."""


@torch.no_grad()
def compress_blocks(stream: LayerStream, method: Method, store: Store, shards: Shards, team: Team, emit: Emit) -> None:
    """For each block, for each group: solve, replace, write. Processes share rows or experts; the first one writes."""
    with Background("writer") as behind:
        for block in stream:
            if team.decide(choice=shards.finished(block.index)):
                behind.wait()  # what the blocks have recorded is in their order
                shards.restore(block, store.suffixes, store.weight)
                emit(Event("progress", "blocks", block.index + 1, len(stream)))
                continue
            entering = stream.hidden.copy() if method.refine and stream.hidden is not None else None
            solutions: dict[str, Solution] = {}
            facts: dict[str, dict[str, Any]] = {}
            for batch in block.batches(staged=method.staged):
                if not batch[0].names:
                    continue
                emit(Event("progress", batch[-1].names[-1]))
                method.before(batch)
                with naming(batch):
                    if batch[0].tokens is None:
                        problem, weight = method.problem(batch[0]), batch[0].stacked()
                        n, k = weight.shape
                        parts = []
                        for own in team.rows(n):
                            for rows in slabs(own, k, on_gpu=weight.is_cuda, size=problem.slab):
                                parts.append(problem.solve(weight[rows], rows))  # noqa: PERF401 (a comprehension is one more frame)
                        solution = Solution.join(parts).map(lambda own, n=n: team.gather(own, n))  # type: ignore[misc]
                        solved: Iterable[tuple[Group, Solution]] = [(batch[0], solution)]
                    else:
                        solved = solve_experts(batch, method.problem, team, method.experts)
                    for group, solution in solved:
                        for name, rows in group.rows():
                            facts[name] = group.facts
                            solutions[name] = solution.map(lambda whole, rows=rows: whole[rows])  # type: ignore[misc]
                            group.replace(name, solutions[name].value(group.weight(name).dtype))
            found: dict[str, Any] = {}
            if method.refine and entering is not None and solutions:
                with span("train"):
                    solutions, found = method.refine(block, entering, solutions)
            if team.leads:
                records = [
                    record_of(name, each) | method.note(name, each) | facts[name] | found for name, each in solutions.items()
                ]
                with span("pack"):
                    stored = {f"{n}.{s}": t for n, each in solutions.items() for s, t in store.tensors(n, each).items()}
                behind.hand_over(shards.writing(block.index, stored, records))
            emit(Event("progress", "blocks", block.index + 1, len(stream)))
        if team.leads:
            behind.hand_over(shards.write_rest)
            if stream.hidden is not None:
                behind.hand_over(shards.writing_reference(stream))


def record_of(name: str, solution: Solution) -> dict[str, Any]:
    """What the manifest says about one linear; a solution that is not finite stops the run here."""
    output, weight = finite(name, solution).output_error, solution.weight_error
    return {
        "name": name,
        "shape": list(solution.weight.shape),
        "output_error": None if output is None else float(f"{output:.6g}"),
        "weight_error": float(f"{weight:.6g}"),
        "damp": solution.damp,
    }
