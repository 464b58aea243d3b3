"""What the solving of one block comes to, part by part: the least seconds that a machine could take for it.

A part is counted in floating-point operations and divided by the rate of a large matrix product. The parts are those that the
stream and the solvers report as spans (`stopwatch.py`), so that a measurement can stand beside its floor, and a forecast is the
floor times what each part was measured to take of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from marlin_tools.algorithms import GPTQ, RTN, Pruner
from marlin_tools.stream.inventory import Inventory, Target

_EXACT = {"cuda": 3, "cpu": 1}
"""How many products at full rate a float32 product costs: on a GPU it is cut in three of 16 bits; a CPU has no other rate."""

_HALF_EXACT = {"cuda": 2, "cpu": 1}
"""The same where one factor has 16 bits."""

_DOUBLE = {"cuda": 12, "cpu": 2}
"""The same for float64."""


@dataclass(frozen=True)
class Work:
    """One block: its linears by what they read, how many tokens go through it, and the linears that stay as they are."""

    groups: Sequence[Sequence[Target]]
    hidden: int
    tokens: int
    longest: int
    kept: Sequence[Target] = ()

    @property
    def solved(self) -> int:
        """Weights of the linears that do not stay as they are."""
        return sum(t.n * t.k for group in self.groups for t in group)

    @property
    def weights(self) -> int:
        """Weights of all linears."""
        return self.solved + sum(t.n * t.k for t in self.kept)

    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of every group."""
        return [(sum(t.n for t in group), group[0].k) for group in self.groups if group]

    def forward(self) -> int:
        """Operations of the model itself: its linears, and attention to half of all pairs."""
        seen = sum(t.n * t.k * t.share for group in (*self.groups, self.kept) for t in group)
        return int(2 * seen * self.tokens) + 2 * self.tokens * self.longest * self.hidden


def works(inventory: Inventory, tokens: int, longest: int) -> list[tuple[Work, int]]:
    """What each kind of block comes to, and how many there are of it: blocks whose linears have the same shapes are of a kind.

    One may be dense and the next a mixture of experts, and of some nothing may be solved.
    """
    hidden = int(inventory.checkpoint.text_config["hidden_size"])
    kinds: dict[tuple[tuple[tuple[int, int, float], ...], ...], list[Work]] = {}
    for index in range(inventory.blocks):
        work = Work(inventory.reads_same_input(index), hidden, tokens, longest, inventory.kept_in(index))
        shapes = tuple(tuple((t.n, t.k, t.share) for t in group) for group in (*work.groups, work.kept))
        kinds.setdefault(shapes, []).append(work)
    return [(alike[0], len(alike)) for alike in kinds.values()]


def least_seconds(work: Work, solver: RTN | GPTQ | Pruner, rate: float, device: torch.device) -> dict[str, float]:
    """Seconds per part at `rate` operations per second, which is that of 16-bit products on a GPU and of float32 on a CPU."""
    if isinstance(solver, RTN) or not work.tokens:
        return {}
    sizes = work.sizes()
    exact, half_exact = rate / _EXACT[device.type], rate / _HALF_EXACT[device.type]
    square = sum(n * k * k for n, k in sizes)
    parts = {
        "forward": (2 if solver.drift or not solver.staged else 1) * work.forward() / rate,
        "hessian": sum(group[0].k ** 2 * group[0].share for group in work.groups if group) * work.tokens / rate,
        "factor": sum(k**3 for _, k in sizes) / 3 * _DOUBLE[device.type] / rate,
        "sweep": square / exact,
        "judge": 4 * square / rate,
    }
    if solver.drift:
        seen_by_all = [group for group in work.groups if group and group[0].share == 1]  # experts' drift is not measured
        closing = [(group[0].n, group[0].k) for group in seen_by_all if len(group) == 1]
        entering = [(sum(t.n for t in group), group[0].k) for group in seen_by_all if len(group) > 1]
        pairs = sum(n * k for n, k in closing) + sum(k * k for _, k in entering)
        one_more = 2 * sum(n * k * k for n, k in closing)
        parts["drift"] = 2 * work.tokens * pairs / rate + one_more / half_exact
        solved = one_more + 2 * sum(k**3 for _, k in entering)
        parts["correct"] = solved / exact + 2 * sum(n * k * k for n, k in entering) / half_exact
    if isinstance(solver, GPTQ) and solver.polish:
        parts["polish"] = 2 * square * solver.polish / exact
    return parts
