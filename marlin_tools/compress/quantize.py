"""Stage `quantize`: a 16-bit model and calibration tokens -> the same model with INT4 linears.

The loop over the blocks is `blockwise.py`; here is what a user can choose, and how one group of linears gets its codes.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, PRUNER_OF, PRUNERS, RTN, Algorithm, Placing, Pruner, Solved
from marlin_tools.algorithms.masks import is_2_4
from marlin_tools.checkpoint.journal import Journal
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.blockwise import BlockWork, Job, Made, Plan, make, record_of
from marlin_tools.compress.forecast import forecast_quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.crew import assembled
from marlin_tools.distributed.device import describe_device, pick_device
from marlin_tools.errors import ModelError, RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.formats import FORMATS
from marlin_tools.settings import Settings
from marlin_tools.stopwatch import span
from marlin_tools.stream.inventory import check_format, check_quads, take_inventory
from marlin_tools.stream.layer_stream import Group

REVISION = 4
"""Raised when the same inputs would give other codes, so that old unfinished runs are not continued."""


class QuantizeSettings(Settings):
    """What to quantise with.

    preset            a name in `algorithms.PRESETS`: default, fast, marlin (the paper's recipe), rtn
    algorithm         all settings of an algorithm, instead of a preset
    damp              overrides the preset's damping
    negative_scales   overrides whether scales may be negative
    group_size        inputs that share a scale; -1 for one scale per output column
    format            how the linears are stored
    sparsity          "2:4" keeps the zeros of linears that are 2:4 already and prunes the others; "keep" insists that all are
    ignore            regular expressions; linears whose full name matches stay as they are
    device            auto, cpu, cuda or cuda:N
    """

    preset: str = "default"
    algorithm: Algorithm | None = None
    damp: float | None = Field(None, gt=0, le=10)
    negative_scales: bool | None = None
    group_size: int = 128
    format: str = "compressed-tensors"
    sparsity: Literal["2:4", "keep"] | None = None
    ignore: tuple[str, ...] = ()
    device: str = "auto"

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"unknown preset `{name}`; known: {', '.join(PRESETS)}")
        return name

    @property
    def pruner(self) -> Pruner:
        """What finds the mask of a linear that has none yet."""
        solver = self.solver
        usual = PRUNER_OF[self.preset] if self.algorithm is None else "default" if solver.needs_data else "magnitude"
        return PRUNERS[usual].model_copy(update={"damp": solver.damp}) if isinstance(solver, GPTQ) else PRUNERS[usual]

    @property
    def solver(self) -> RTN | GPTQ:
        """The algorithm with all overrides applied and checked."""
        base = self.algorithm or PRESETS[self.preset]
        overrides = {"damp": self.damp, "signed": self.negative_scales}
        changed = {key: value for key, value in overrides.items() if value is not None}
        if not changed:
            return base
        if isinstance(base, RTN):
            raise RecipeError(f"`{'`, `'.join(changed)}` means nothing to round-to-nearest", hint="choose another `--preset`")
        try:
            return GPTQ.model_validate({**base.model_dump(), **changed})
        except ValueError as error:
            raise RecipeError(f"preset `{self.preset}`: {error}", hint="drop the option that contradicts it") from error


def plan_quantize(model: str | Path | Checkpoint, settings: QuantizeSettings, tokens: int, longest: int) -> Plan:
    """Check a run and predict its cost from headers alone. `tokens` and `longest` describe the calibration."""
    check_format(settings.format)
    checkpoint = Checkpoint.open(model, accept=find_family)
    sparse = settings.sparsity is not None
    inventory = take_inventory(checkpoint, settings.ignore, settings.group_size, settings.format, sparse=sparse)
    if sparse:
        check_quads(inventory)
    device = pick_device(settings.device)
    needs_data = settings.solver.needs_data
    forecast = forecast_quantize(checkpoint, inventory, settings.solver, tokens if needs_data else 0, longest, device)
    return Plan(checkpoint, inventory, forecast)


def quantize(
    model: str | Path | Checkpoint,
    tokens: TokenSet | None,
    settings: QuantizeSettings,
    out: str | Path,
    *,
    emit: Emit = silent,
    overwrite: bool = False,
    resume: bool = True,
) -> Checkpoint:
    """Quantise `model` into the directory `out`; a killed run continues where it stopped, with the same bytes in the end.

    Several processes that `torchrun` has started do it together.
    """
    solver = settings.solver
    if solver.needs_data and tokens is None:
        raise ValueError("this algorithm needs calibration tokens")
    device = pick_device(settings.device)
    with assembled(device) as crew:
        emit = emit if crew.leads else silent
        emit(Event("stage", "quantize"))
        seen = tokens if solver.needs_data else None
        windows = sum(len(part) for part in crew.share(seen.sequences)) if seen else 0
        for line in crew.lines(f"process {crew.rank}: {device}, {describe_device(device)}, {windows} calibration sequences"):
            if crew.cuts:
                emit(Event("note", line))
        plan = plan_quantize(model, settings, tokens.tokens if tokens else 0, tokens.longest if tokens else 0)
        if settings.sparsity == "keep":
            _check_masks(plan)
        identity = {
            "revision": REVISION,
            "settings": settings.model_dump(exclude={"preset", "algorithm", "damp", "negative_scales"}),
        }
        job = Job("quantize", plan, seen, solver, settings, identity, {"format": settings.format}, device, crew)
        return make(job, _Work, out, emit, overwrite=overwrite, resume=resume)


def _check_masks(plan: Plan) -> None:
    """Refuse a model whose zeros cannot be kept as a 2:4 mask, before any work."""
    dense = [t.name for t in plan.inventory.targets if not is_2_4(plan.checkpoint.read(f"{t.name}.weight"))]
    if dense:
        more = f" and {len(dense) - 1} more have" if len(dense) > 1 else " has"
        raise ModelError(
            f"`{plan.checkpoint.origin}` is not 2:4 sparse: `{dense[0]}`{more} more than two nonzeros in four",
            hint="prune it first (`marlin-tools prune`), or use `--sparsity 2:4`, which prunes what is dense",
        )


class _Work(BlockWork):
    """One run of the stage."""

    def __init__(self, job: Job, output: OutputDirectory, journal: Journal | None, emit: Emit) -> None:
        super().__init__(job, output, journal, emit)
        assert isinstance(job.settings, QuantizeSettings)
        self.settings, self.solver, self.format = job.settings, job.settings.solver, FORMATS[job.settings.format]
        self.suffixes = self.format.suffixes

    def solve(self, group: Group) -> dict[str, Made]:
        """One solve for all linears of a group (their rows are independent), then one result each."""
        weight = group.stacked()
        group_size = self.settings.group_size if self.settings.group_size > 0 else weight.shape[1]
        sparse = {name: is_2_4(group.weight(name)) for name in group.names}
        placing = self._placing(group, sparse) if self.settings.sparsity else None
        crew = self.job.crew
        solved = self.solver.solve(group.names[0], weight, group.hessian, group_size, self.checkpoint.dtype, placing, crew)
        parts = dict(zip(group.names, solved.split([group.weight(name).shape[0] for name in group.names]), strict=True))
        return {name: self._made(name, part, group, was_sparse=sparse[name]) for name, part in parts.items()}

    def _placing(self, group: Group, sparse: dict[str, bool]) -> Placing:
        """The pruner for this group: linears that are 2:4 keep their zeros, the others are given a mask."""
        fixed = torch.cat([(group.weight(name) != 0) & sparse[name] for name in group.names])
        return self.settings.pruner.placing(group.names[0], group.hessian, fixed)

    def _made(self, name: str, solved: Solved, group: Group, *, was_sparse: bool) -> Made:
        linear = solved.linear
        record = record_of(name, linear.shape, output=solved.output_error, weight=solved.weight_error, damp=solved.damp)
        if self.settings.sparsity:
            assert linear.is_2_4(), name
            record["mask"] = "kept" if was_sparse else "chosen"
        elif was_sparse and not linear.is_2_4():
            record["mask"] = "lost"
        with span("pack"):
            stored = self.format.pack(linear, self.checkpoint.dtype) if self.job.crew.leads else {}
            return Made(linear.dequantize(group.weight(name).dtype), stored, record)

    def restored(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """The values of the codes and scales."""
        n, k = like.shape
        return self.format.unpack(stored, (n, k)).dequantize(like.dtype)

    def warn_about(self, entries: list[dict[str, Any]]) -> None:
        """Also of zeros that were there and are no more."""
        lost = [record["name"] for entry in entries for record in entry["linears"] if record.get("mask") == "lost"]
        if lost:
            self.warnings.append(
                f"the 2:4 zeros of {len(lost)} linears were not kept (`{lost[0]}`); `--sparsity keep` keeps them"
            )
        super().warn_about(entries)

    def quantization_config(self) -> dict[str, Any]:
        """What the format wants to be recognised by."""
        kept = [*self.inventory.kept, self.inventory.family.head]
        return self.format.quantization_config(self.settings.group_size, kept)
