"""Stage `prune`: a 16-bit model and calibration tokens -> the same model with two of every four weights zero.

The result is a dense checkpoint of the original's type with the zeros in it, so everything that reads the original reads it.
The loop over the blocks is `loop.py`, the pruning of one weight `algorithms/pruning.py`; with `reconstruct`, the kept weights
of each block are then trained together towards the outputs of the original block (`reconstruct.py`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from marlin_tools.algorithms import Problem, Solution
from marlin_tools.algorithms.pruning import PRUNERS, Pruner, PrunerName
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.forecast import forecast_prune
from marlin_tools.compress.guide import Guide, what_is_read
from marlin_tools.compress.job import BlockStage, Job, Preparation, compress
from marlin_tools.compress.loop import Method
from marlin_tools.compress.reconstruct import Reconstruction, reconstruct
from marlin_tools.compress.stores import DenseStore
from marlin_tools.data.tokens import TokenSet, check_arguments
from marlin_tools.distributed.device import pick_device
from marlin_tools.errors import RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.stage import Outlook, StagePlan, Work
from marlin_tools.stream.activations import Activations
from marlin_tools.stream.inventory import check_quads, check_shapes, take_linears
from marlin_tools.stream.layer_stream import Block, Group

REVISION = 10
"""Raised when the same inputs would give other weights, so that old unfinished runs are not continued."""


class PruneSettings(BlockStage):
    """What to prune with.

    preset        a name in `algorithms.pruning.PRUNERS`: default, max, sparsegpt (as published), wanda, magnitude
    algorithm     all settings of a pruner, instead of a preset
    damp          overrides the preset's damping
    reconstruct   passes over the calibration tokens in which each block's kept weights learn its original outputs; 0: none
    rate          learning rate of that training
    ignore        regular expressions; linears whose full name matches stay as they are
    device        auto, cpu, cuda or cuda:N
    """

    stage: Literal["prune"] = "prune"
    preset: PrunerName = "default"
    algorithm: Pruner | None = None
    reconstruct: int = Field(0, ge=0, le=1000)
    rate: float = Field(3e-4, gt=0, le=1)

    @property
    def solver(self) -> Pruner:
        """The pruner with all overrides applied and checked."""
        base = self.algorithm or PRUNERS[self.preset]
        if self.damp is not None:
            base = base.model_copy(update={"damp": self.damp})
        if self.reconstruct and not base.needs_data:
            raise RecipeError(
                f"preset `{self.preset}` looks at no data, `reconstruct` needs some",
                hint="choose another preset, or no `reconstruct`",
            )
        return base

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How blocks are trained, if they are."""
        return Reconstruction(passes=self.reconstruct, rate=self.rate) if self.reconstruct else None

    @property
    def makes(self) -> tuple[str, ...]:
        """One model in 16 bits."""
        return ("pruned",)

    def plan(self, outlook: Outlook) -> StagePlan:
        """Refuse what could not be pruned; forecast the rest."""
        prepared = prepare_prune(outlook.model, self, *outlook.tokens)
        if not outlook.dry:
            check_shapes(prepared.inventory)
        facts = [
            ("preset", self.preset if self.algorithm is None else self.algorithm.mask),
            *outlook.calibration(),
            *([("guide", what_is_read(outlook.tokens[0]))] if self.solver.guided else []),
            *prepared.forecast.lines(),
            *((f"kept `{name}`", reason) for name, reason in prepared.inventory.kept.items()),
        ]
        return StagePlan(tuple(facts), prepared)

    def run(self, work: Work) -> dict[str, Any]:
        """Prune the model into the one directory that there is."""
        with work.clock("calibrate and prune", work.output, device=self.device):
            prune(work.prepared or work.model, work.tokens(work.text), self, work.output, **work.how)
        return {}


def prepare_prune(model: str | Path | Checkpoint, settings: PruneSettings, tokens: int, longest: int) -> Preparation:
    """Check a run and predict its cost from headers alone. `tokens` and `longest` describe the calibration."""
    checkpoint = Checkpoint.open(model, accept=find_family)
    inventory = take_linears(checkpoint, settings.ignore)
    check_quads(inventory)
    device = pick_device(settings.device)
    seen = tokens if settings.solver.needs_data else 0
    forecast = forecast_prune(checkpoint, inventory, settings.solver, (seen, longest), device, trained=settings.reconstruct > 0)
    return Preparation(checkpoint, inventory, forecast)


def prune(
    model: str | Path | Checkpoint | Preparation,
    tokens: TokenSet | None,
    settings: PruneSettings,
    out: str | Path,
    *,
    emit: Emit = silent,
    overwrite: bool = False,
    resume: bool = True,
) -> Checkpoint:
    """Prune `model` to 2:4 into the directory `out`; a killed run continues where it stopped, with the same bytes."""
    emit(Event("stage", "prune"))
    check_arguments(settings, PruneSettings, tokens)
    if (solver := settings.solver).needs_data and tokens is None:
        raise ValueError("this way of pruning needs calibration tokens")
    if not isinstance(model, Preparation):
        model = prepare_prune(model, settings, *((tokens.tokens, tokens.longest) if tokens else (0, 0)))
        check_shapes(model.inventory)
    plan = model
    identity = {
        "stage": "prune",
        "revision": REVISION,
        "settings": settings.model_dump(exclude={"stage", "preset", "algorithm", "damp"}),
    }
    seen, device, how = tokens if solver.needs_data else None, pick_device(settings.device), settings.reconstruction
    original = solver.drift > 0 or solver.guided or how is not None
    facts = {"sparsity": "2:4"}
    job = Job("prune", plan, seen, solver, settings, identity, facts, None, device, original)

    def problem(group: Group) -> Problem:
        dtype = plan.inventory.dtype(group.names[0])
        return solver.problem(group.names[0], group.hessian, dtype)

    guide = Guide(plan.inventory, emit) if solver.guided else None
    method = Method(problem, staged=solver.staged, refine=_training(how, emit) if how else None, guide=guide)
    return compress(job, method, DenseStore(plan.inventory), out, emit, overwrite=overwrite, resume=resume)


def _training(how: Reconstruction, emit: Emit) -> Any:
    """Train what is left of a block towards what the original block puts out."""

    def refine(
        block: Block, entering: Activations, solutions: dict[str, Solution]
    ) -> tuple[dict[str, Solution], dict[str, Any]]:
        pruned = {name: each.dense for name, each in solutions.items()}
        weights, before, after = reconstruct(block, entering, pruned, how, emit)
        note = {"block_error": [float(f"{before:.6g}"), float(f"{after:.6g}")]}
        return {name: replace(each, weight=weights[name]) for name, each in solutions.items()}, note

    return refine
