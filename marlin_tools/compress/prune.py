"""Stage `prune`: a 16-bit model and calibration tokens -> the same model with two of every four weights zero.

The result is a dense checkpoint of the original's type with the zeros in it, so everything that reads the original reads it.
The loop over the blocks is `blockwise.py`, the pruning of one weight `algorithms/pruning.py`; with `reconstruct`, the kept
weights of each block are then trained together towards the outputs of the original block (`reconstruct.py`).
"""

from pathlib import Path

from pydantic import Field, field_validator
from torch import Tensor

from marlin_tools.algorithms.pruning import PRUNERS, Pruned, Pruner
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.blockwise import BlockWork, Job, Made, Plan, make, record_of
from marlin_tools.compress.forecast import forecast_prune
from marlin_tools.compress.reconstruct import Reconstruction, reconstruct
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import pick_device
from marlin_tools.errors import RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.settings import Settings
from marlin_tools.stream.inventory import check_quads, take_linears
from marlin_tools.stream.layer_stream import Block, Group

REVISION = 3
"""Raised when the same inputs would give other weights, so that old unfinished runs are not continued."""


class PruneSettings(Settings):
    """What to prune with.

    preset        a name in `algorithms.pruning.PRUNERS`: default, sparsegpt (as published), wanda, magnitude
    algorithm     all settings of a pruner, instead of a preset
    damp          overrides the preset's damping
    reconstruct   passes over the calibration tokens in which each block's kept weights learn its original outputs; 0: none
    rate          learning rate of that training
    ignore        regular expressions; linears whose full name matches stay as they are
    device        auto, cpu, cuda or cuda:N
    """

    preset: str = "default"
    algorithm: Pruner | None = None
    damp: float | None = Field(None, gt=0, le=10)
    reconstruct: int = Field(0, ge=0, le=1000)
    rate: float = Field(3e-4, gt=0, le=1)
    ignore: tuple[str, ...] = ()
    device: str = "auto"

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRUNERS:
            raise ValueError(f"unknown preset `{name}`; known: {', '.join(PRUNERS)}")
        return name

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


def plan_prune(model: str | Path | Checkpoint, settings: PruneSettings, tokens: int, longest: int) -> Plan:
    """Check a run and predict its cost from headers alone. `tokens` and `longest` describe the calibration."""
    checkpoint = Checkpoint.open(model, accept=find_family)
    inventory = take_linears(checkpoint, settings.ignore)
    check_quads(inventory)
    device = pick_device(settings.device)
    seen = tokens if settings.solver.needs_data else 0
    forecast = forecast_prune(checkpoint, inventory, settings.solver, seen, longest, device, settings.reconstruct)
    return Plan(checkpoint, inventory, forecast)


def prune(
    model: str | Path | Checkpoint,
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
    solver = settings.solver
    if solver.needs_data and tokens is None:
        raise ValueError("this way of pruning needs calibration tokens")
    plan = plan_prune(model, settings, tokens.tokens if tokens else 0, tokens.longest if tokens else 0)
    identity = {
        "stage": "prune",
        "revision": REVISION,
        "settings": settings.model_dump(exclude={"preset", "algorithm", "damp"}),
    }
    seen = tokens if solver.needs_data else None
    job = Job("prune", plan, seen, solver, settings, identity, {"sparsity": "2:4"}, pick_device(settings.device))
    return make(job, _Work, out, emit, overwrite=overwrite, resume=resume)


class _Work(BlockWork):
    """One run of the stage."""

    suffixes = ("weight",)

    @property
    def settings(self) -> PruneSettings:
        """What the user chose."""
        assert isinstance(self.job.settings, PruneSettings)
        return self.job.settings

    @property
    def compares(self) -> bool:
        """Reconstruction aims at what the original blocks put out."""
        return super().compares or self.settings.reconstruct > 0

    def solve(self, group: Group) -> dict[str, Made]:
        """One solve for all linears of a group (their rows are independent), then one result each."""
        pruned = self.settings.solver.prune(group.names[0], group.stacked(), group.hessian)
        made, start = {}, 0
        for name in group.names:
            rows = slice(start, start + group.weight(name).shape[0])
            made[name] = self._made(name, pruned, rows)
            start = rows.stop
        return made

    def _made(self, name: str, pruned: Pruned, rows: slice) -> Made:
        """The values as the checkpoint's own type holds them; the stream goes on with just these."""
        weight = pruned.placed.value[rows].to(self.checkpoint.stored(f"{name}.weight").dtype)
        output, own = pruned.errors.of(rows)
        n, k = weight.shape
        return Made(weight, {"weight": weight}, record_of(name, (n, k), output=output, weight=own, damp=pruned.damp))

    def begin(self, block: Block) -> None:
        """Remember what the block reads, for training it later."""
        hidden = block.stream.hidden
        self._entering = hidden.copy() if hidden is not None and self.settings.reconstruct else None

    def settle(self, block: Block, made: dict[str, Made]) -> dict[str, Made]:
        """Train what is left of the block, if that was asked for."""
        how = self.settings.reconstruction
        if how is None or self._entering is None:
            return made
        pruned = {name: each.weight for name, each in made.items()}
        weights, before, after = reconstruct(block, self._entering, pruned, how, self.emit)
        note = {"block_error": [float(f"{before:.6g}"), float(f"{after:.6g}")]}
        return {name: Made(weights[name], {"weight": weights[name]}, each.record | note) for name, each in made.items()}

    def restored(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """As it was written."""
        return stored["weight"]

    def quantization_config(self) -> None:
        """None: the weights are stored like the original's."""
        return
