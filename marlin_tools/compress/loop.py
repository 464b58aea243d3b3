"""The loop: for each block, for each group of linears that read the same tensor, solve, replace, write.

Blocks stream by. Each group is solved against the Hessian of what it really reads, the stream goes on with the new weights, and
the block is on disk before the next one is loaded. What is done to a group is a `Method`, how its linears are stored a `Store`;
`job.py` makes a model directory of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_tools.algorithms.solution import Solution, check_finite
from marlin_tools.compress.dense import DenseChoice
from marlin_tools.compress.guide import Guide
from marlin_tools.compress.naming import naming
from marlin_tools.compress.shards import Shards
from marlin_tools.compress.solved import Solve, SolveAll, Solved, own_rows, solve_experts
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
    guide     tells the rows of a group of each other; to be made before the first block, too
    chunk     tokens that go through a block at a time
    """

    problem: Solve
    experts: SolveAll | None = None
    before: Callable[[list[Group]], None] = lambda _batch: None
    staged: bool = True
    note: Callable[[str, Solution], dict[str, Any]] = lambda _name, _solution: {}
    refine: Refine | None = None
    dense: DenseChoice | None = None
    guide: Guide | None = None
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

    def tensors(self, solved: Solved) -> dict[str, Tensor]:
        """What is written, by its full name."""

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
            if method.guide:
                method.guide.look(block)
            solved: list[Solved] = []
            facts: dict[str, dict[str, Any]] = {}
            for batch in block.batches(staged=method.staged):
                if not batch[0].names:
                    continue
                emit(Event("progress", batch[-1].names[-1]))
                method.before(batch)
                with naming(batch):
                    if batch[0].tokens is None:
                        problem, weight = method.problem(batch[0]), batch[0].stacked()
                        if method.guide:
                            problem = method.guide.couple(problem, batch[0])
                        parts = []
                        for rows in own_rows(problem, weight, team):
                            parts.append(problem.solve(weight[rows], rows))  # noqa: PERF401 (a comprehension is one more frame)
                        solved.append(Solved.of_group(batch[0], parts, team))
                    else:
                        solved.append(solve_experts(batch, method.problem, team, method.experts))
                groups = {name: group for group in batch for name in group.names}
                facts.update((name, group.facts) for name, group in groups.items())
                for name, weight in solved[-1].values(batch[0].weight(batch[0].names[0]).dtype):
                    groups[name].replace(name, weight)
            found: dict[str, Any] = {}
            if method.refine and entering is not None and solved:
                with span("train"):
                    solutions, found = method.refine(block, entering, dict(pair for each in solved for pair in each.each()))
                    solved = [Solved.of(*pair) for pair in solutions.items()]
            if team.leads:
                records = [
                    record | method.note(name, solution) | facts[name] | found
                    for each in solved
                    for (name, solution), record in zip(each.each(), records_of(each), strict=True)
                ]
                with span("pack"):
                    stored = {name: tensor for each in solved for name, tensor in store.tensors(each).items()}
                behind.hand_over(shards.writing(block.index, stored, records))
            emit(Event("progress", "blocks", block.index + 1, len(stream)))
        if team.leads:
            behind.hand_over(shards.write_rest)
            if stream.hidden is not None:
                behind.hand_over(shards.writing_reference(stream))


def records_of(solved: Solved) -> Iterator[dict[str, Any]]:
    """What the manifest says about each linear; a solution that is not finite stops the run here."""
    for name, (output, weight) in solved.errors().items():
        check_finite(name, output, weight)
        rows = solved.rows[name]
        yield {
            "name": name,
            "shape": [rows.stop - rows.start, solved.whole.weight.shape[1]],
            "output_error": None if output is None else float(f"{output:.6g}"),
            "weight_error": float(f"{weight:.6g}"),
            "damp": solved.damps[name],
        }
