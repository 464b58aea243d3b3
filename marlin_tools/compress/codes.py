"""How a group of linears gets its codes in stage `quantize`: dense or 2:4, one by one or many experts at once."""

from typing import Any

import torch

from marlin_tools.algorithms import GPTQ, RTN, Problem, Pruner, Solution
from marlin_tools.algorithms.hessian import ALONE
from marlin_tools.algorithms.pruning import MaskSolver
from marlin_tools.algorithms.recorded import Recordings
from marlin_tools.compress.dense import DenseChoice
from marlin_tools.compress.job import Preparation
from marlin_tools.compress.loop import Method, Refine
from marlin_tools.compress.solved import SolveAll
from marlin_tools.compress.tune import STEP_TOKENS
from marlin_tools.distributed.team import Team
from marlin_tools.quantized import are_2_4, is_2_4
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Group


def method_of(
    solver: RTN | GPTQ,
    pruner: Pruner | None,
    keep_dense: float | None,
    plan: Preparation,
    device: torch.device,
    *,
    team: Team,
    refine: Refine | None,
) -> Method:
    """How a group gets its codes. Linears that are 2:4 keep their zeros if that is wanted, the others are given a mask.

    Those that are to stay dense are not.
    """
    dtype, were_sparse = plan.checkpoint.dtype, dict[str, bool]()
    mixed = len(set(plan.group_sizes.values())) > 1

    def dense(group: Group, mask_solver: MaskSolver | None = None) -> Problem:
        sharing = team if group.tokens is None else ALONE
        return solver.problem(group.names[0], group.hessian, _size_of(group, plan), dtype, mask_solver, sharing)

    def sparse(group: Group) -> Problem:
        assert pruner is not None, "a mask is wanted"
        fixed = torch.cat([(group.weight(name) != 0) & is_2_4(group.weight(name)) for name in group.names])
        return dense(group, pruner.mask_solver(group.names[0], group.hessian, fixed))

    choice = DenseChoice(keep_dense, (dense, sparse), plan.inventory) if keep_dense else None

    def stays_dense(name: str) -> bool:
        return pruner is None or (choice is not None and name in choice.names)

    def before(batch: list[Group]) -> None:
        weights = {name: group.weight(name) for group in batch for name in group.names}
        were_sparse.update(zip(weights, are_2_4(list(weights.values())), strict=True))

    def problem(group: Group) -> Problem:
        return dense(group) if stays_dense(group.names[0]) else sparse(group)

    def note(name: str, solution: Solution) -> dict[str, Any]:
        said: dict[str, Any] = {"group_size": plan.group_sizes[name]} if mixed else {}
        if not stays_dense(name):
            assert solution.linear.is_2_4(), name
            said["mask"] = "kept" if were_sparse[name] else "chosen"
        elif were_sparse[name] and not solution.linear.is_2_4():
            said["mask"] = "lost"
        elif pruner is not None:
            said["mask"] = "none"
        return said

    experts = _at_once(solver, plan) if device.type == "cuda" and pruner is None else None
    chunk = STEP_TOKENS[device.type] if refine else CHUNK_TOKENS
    return Method(problem, experts, before, solver.staged, note, refine, choice, chunk=chunk)


def _size_of(group: Group, plan: Preparation) -> int:
    """How many inputs of this group share a scale."""
    size = plan.group_sizes[group.names[0]]
    return size if size > 0 else group.weight(group.names[0]).shape[1]


def _at_once(solver: RTN | GPTQ, plan: Preparation) -> SolveAll | None:
    """How a GPU solves experts that need no mask."""
    if not isinstance(solver, GPTQ):
        return None
    recordings = Recordings(solver, plan.checkpoint.dtype)

    def experts(groups: list[Group]) -> list[Solution]:
        asked = [(group.names[0], group.stacked(), group.hessian) for group in groups if group.hessian]
        return recordings.solve(asked, _size_of(groups[0], plan))

    return experts
