"""Stage `quantize`: a 16-bit model and calibration tokens -> the same model with INT4 linears.

The loop over the blocks is `loop.py`, and how one group of linears gets its codes `codes.py`; here is what a user can choose.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import PlainValidator, WithJsonSchema

from marlin_tools.algorithms import (
    GPTQ,
    PRESETS,
    PRUNER_OF,
    PRUNERS,
    RTN,
    Algorithm,
    Preset,
    Pruner,
)
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.codes import method_of
from marlin_tools.compress.dense import Share, check_dense, check_room
from marlin_tools.compress.forecast import forecast_quantize
from marlin_tools.compress.guide import Guide, what_is_read
from marlin_tools.compress.job import BlockStage, Job, Preparation, compress
from marlin_tools.compress.loop import Refine
from marlin_tools.compress.stores import CodeStore
from marlin_tools.compress.tune import Tuning, held_out, tune
from marlin_tools.data.tokens import TokenSet, check_arguments
from marlin_tools.distributed.device import describe_device, pick_device
from marlin_tools.distributed.team import Team, assembled, expected
from marlin_tools.errors import DataError, ModelError, RecipeError, counted
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.formats import FORMATS, FormatName
from marlin_tools.formats.config import with_activations, with_group_sizes
from marlin_tools.quantized import ActivationType, is_2_4
from marlin_tools.stage import Outlook, StagePlan, Work
from marlin_tools.stream.inventory import Inventory, check_limits, check_quads, check_shapes, largest_group_sizes, take_linears

REVISION = 11
"""Raised when the same inputs would give other codes, so that old unfinished runs are not continued."""

TUNED = 3
"""The same for what tuning gives."""

CHOSEN = 1
"""The same for which linears stay dense."""

_ELSEWHERE = {"stage", "preset", "algorithm", "tuning", "damp", "negative_scales", "activations", "keep_dense"}
"""Settings that a fingerprint has in another place, or only where they change something."""


def _known_size(size: object) -> object:
    """A whole number, also as people type it, or `auto`."""
    if isinstance(size, str) and re.fullmatch(r"-?\d{1,9}", size):
        size = int(size)
    if size == AUTO or (type(size) is int and (size == -1 or size > 0)):
        return size
    raise ValueError("a group size is 128, 64, 32, -1 (one scale per output) or `auto`")


AUTO: Final = "auto"
GroupSize = Annotated[
    int | Literal["auto"],
    PlainValidator(_known_size),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"const": AUTO}]}),
]
"""Inputs that share a scale, or that they are to be chosen."""


class QuantizeSettings(BlockStage):
    """What to quantise with.

    preset            a name in `algorithms.PRESETS`: default, fast, marlin (the paper's recipe), rtn; max is default, and tuned
    algorithm         all settings of an algorithm, instead of a preset
    tuning            train the codes and scales of each block afterwards, and how
    damp              overrides the preset's damping
    negative_scales   overrides whether scales may be negative
    group_size        inputs that share a scale; -1 for one scale per output column, "auto" for the largest of 128, 64 and 32
                      that fits each linear, or all of them where a format holds one size or activations are FP8
    format            how the linears are stored
    activations       what the linears read: "16bit", or "fp8", e4m3 with a scale for each token, found while the model runs
    sparsity          "2:4" keeps the zeros of linears that are 2:4 already and prunes the others; "keep" insists that all are
    keep_dense        at most this share of the weights stays dense under "2:4": the linears that it costs most (`dense.py`)
    ignore            regular expressions; linears whose full name matches stay as they are
    device            auto, cpu, cuda or cuda:N
    """

    shares: ClassVar[bool] = True

    stage: Literal["quantize"] = "quantize"
    preset: Preset = "default"
    algorithm: Algorithm | None = None
    tuning: Tuning | None = None
    negative_scales: bool | None = None
    group_size: GroupSize = 128
    format: FormatName = "compressed-tensors"
    activations: ActivationType = "16bit"
    sparsity: Literal["2:4", "keep"] | None = None
    keep_dense: Share | None = None

    def tuned(self, tokens: int) -> Tuning | None:
        """How each block is trained on so much text once it is solved, if it is."""
        how = self.tuning or (Tuning.of_max(tokens) if self.preset == "max" and not self.algorithm else None)
        return how.fitted(sparse=self.sparsity is not None) if how and how.iters else None

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

    def sized(self, inventory: Inventory, *formats: str) -> dict[str, int]:
        """The group size of each linear of this model, -1 for per column."""
        formats, sparse = (self.format, *formats), self.sparsity is not None and not self.keep_dense
        if self.group_size == AUTO:  # kernels for FP8 activations want one size everywhere
            mixed = self.activations == "16bit" and all(FORMATS[name].mixes for name in formats)
            sizes = largest_group_sizes(inventory, formats, sparse=sparse, mixed=mixed)
        else:
            sizes = {target.name: self.group_size for target in inventory.targets}
        if isinstance(self.solver, GPTQ):
            for size in set(sizes.values()):
                self.solver.check_group_size(size, 0)
        for name in formats:
            check_limits(inventory, sizes, name, sparse=sparse)
        return sizes

    @property
    def makes(self) -> tuple[str, ...]:
        """One model, named by its format."""
        return (self.format,)

    def plan(self, outlook: Outlook) -> StagePlan:
        """Refuse what could not be solved, stored or exported later; forecast the rest."""
        prepared, how = prepare_quantize(outlook.model, self, *outlook.tokens, outlook.formats), self.tuned(outlook.tokens[0])
        inventory = prepared.inventory
        if not outlook.dry:
            check_shapes(inventory)
        shapes = {target.name: (target.n, target.k) for target in inventory.targets}
        counts = Counter(shapes.values()).items()
        facts = [
            ("preset", self.preset if self.algorithm is None else self.algorithm.kind),
            *outlook.calibration(),
            *([("activations", "FP8, e4m3 with a scale for each token")] if self.activations == "fp8" else []),
            *([("guide", what_is_read(outlook.tokens[0]))] if self.solver.guided else []),
            *([("tuning", f"{counted(how.iters, 'step')} for each block")] if how else []),
            *(
                [("stays dense", f"at most {100 * self.keep_dense:.4g} % of the weights, chosen first")]
                if self.keep_dense
                else []
            ),
            ("blocks", str(inventory.blocks)),
            *((("group size", _in_words(prepared.group_sizes)),) if self.group_size == AUTO else ()),
            ("shapes", ", ".join(f"{count} of {n} x {k}" for (n, k), count in counts)),
            *prepared.forecast.lines(),
            *((f"kept `{name}`", reason) for name, reason in inventory.kept.items()),
        ]
        return StagePlan(tuple(facts), prepared)

    def run(self, work: Work) -> dict[str, Any]:
        """Quantise the model into the one directory that there is."""
        with work.clock("calibrate and quantize", work.output, device=self.device):
            quantize(work.prepared or work.model, work.tokens(work.text), self, work.output, **work.how)
        return {}


def prepare_quantize(
    model: str | Path | Checkpoint, settings: QuantizeSettings, tokens: int, longest: int, formats: Sequence[str] = ()
) -> Preparation:
    """Check a run and predict its cost from headers alone. `tokens` and `longest` describe the calibration.

    `formats` are those of later exports: what they could not hold is refused now.
    """
    checkpoint = Checkpoint.open(model, accept=find_family)
    sparse = settings.sparsity is not None
    _check_activations(settings, formats)
    inventory = take_linears(checkpoint, settings.ignore)
    if settings.keep_dense:
        check_dense(settings.sparsity, (settings.format, *formats), needs_data=settings.solver.needs_data)
        check_room(settings.keep_dense, inventory)
    group_sizes = settings.sized(inventory, *formats)
    if sparse:
        check_quads(inventory)
    device = pick_device(settings.device)
    seen = tokens if settings.solver.needs_data else 0
    also: Literal["tuning", "choice"] | None = "choice" if settings.keep_dense else None
    if settings.tuned(tokens):
        _check_tuning(settings.solver, tokens, longest)
        also = "tuning"
    if settings.solver.guided and expected().cuts:
        raise RecipeError("rows that make up for each other are solved in one process", hint="start it without `torchrun`")
    pruner = settings.pruner if sparse else None
    forecast = forecast_quantize(checkpoint, inventory, settings.solver, (seen, longest), device, pruner=pruner, also=also)
    return Preparation(checkpoint, inventory, forecast, group_sizes)


def quantize(
    model: str | Path | Checkpoint | Preparation,
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
    check_arguments(settings, QuantizeSettings, tokens)
    if (solver := settings.solver).needs_data and tokens is None:
        raise ValueError("this algorithm needs calibration tokens")
    device = pick_device(settings.device)
    with assembled(device) as team:
        emit = emit if team.leads else silent
        emit(Event("stage", "quantize"))
        seen = tokens if solver.needs_data else None
        _introduce(team, seen, device, emit)
        if not isinstance(model, Preparation):
            model = prepare_quantize(model, settings, *((tokens.tokens, tokens.longest) if tokens else (0, 0)))
            check_shapes(model.inventory)
        plan, sizes = model, model.group_sizes
        if len(set(sizes.values())) == 1:
            settings = settings.model_copy(update={"group_size": max(sizes.values())})
        if settings.sparsity == "keep":
            _check_masks(plan)
        identity = {
            "revision": REVISION,
            "settings": settings.model_dump(exclude=_ELSEWHERE),
            **({"activations": settings.activations} if settings.activations != "16bit" else {}),
        }
        pruner = settings.pruner if settings.sparsity else None
        if pruner:
            identity["pruner"] = pruner.model_dump()
        if settings.keep_dense:
            identity["keep_dense"] = {"share": settings.keep_dense, "revision": CHOSEN}
        how = settings.tuned(tokens.tokens if tokens else 0)
        if how:
            identity["tuning"] = how.model_dump() | {"revision": TUNED}
        store = CodeStore(FORMATS[settings.format], plan.checkpoint)
        config = store.format.quantization_config(max(sizes.values()), plan.inventory.unquantized)
        config = with_activations(with_group_sizes(config, sizes), settings.activations)
        facts: dict[str, Any] = {"format": settings.format}
        if how and seen:
            seen = replace(seen, apart=held_out(len(seen.sequences)))
            facts["tuning"] = how.model_dump() | _hashed(seen)
        original = solver.drift > 0 or solver.guided or how is not None
        job = Job(
            "quantize", plan, seen, solver, settings, identity, facts, config, device, original, team, settings.activations
        )
        refine = _tuning(how, plan.checkpoint.dtype, emit) if how else None
        method = method_of(solver, pruner, settings.keep_dense, plan, device, team=team, refine=refine)
        if solver.guided:
            method = replace(method, guide=Guide(plan.inventory, emit))
        return compress(job, method, store, out, emit, overwrite=overwrite, resume=resume)


def _in_words(sizes: Mapping[str, int]) -> str:
    """One size, or how many linears have each."""
    (most, many), *others = sorted(Counter(sizes.values()).items(), reverse=True)
    return ", ".join([f"{most} for {many} linears" if others else str(most), *(f"{size} for {n}" for size, n in others)])


def _introduce(team: Team, seen: TokenSet | None, device: torch.device, emit: Emit) -> None:
    """Say which process does what, if there are several."""
    windows = sum(map(len, team.share(seen.sequences))) if seen else 0
    for line in team.lines(f"process {team.rank}: {device}, {describe_device(device)}, {windows} calibration sequences"):
        if team.cuts:
            emit(Event("note", line))


def _tuning(how: Tuning, dtype: torch.dtype, emit: Emit) -> Refine:
    return lambda block, entering, solutions: tune(block, entering, solutions, how, dtype, emit)


def _hashed(tokens: TokenSet) -> dict[str, str]:
    """What is trained on and what is only measured, which have no sequence in common."""
    parts = {"tuned_on": tokens.sequences[: -tokens.apart], "held_out": tokens.sequences[-tokens.apart :]}
    return {name: replace(tokens, sequences=part).fingerprint for name, part in parts.items()}


def _check_activations(settings: QuantizeSettings, formats: Sequence[str]) -> None:
    """Refuse FP8 activations where no kernel multiplies with them, or config.json could not speak of them."""
    if settings.activations == "fp8" and settings.sparsity is not None:
        raise RecipeError(
            "no kernel multiplies 2:4 sparse weights with FP8 activations", hint="use `--activations 16bit` with `--sparsity`"
        )
    for name in (settings.format, *formats):
        FORMATS[name].admit_activations(settings.activations)


def _check_tuning(solver: RTN | GPTQ, tokens: int, longest: int) -> None:
    """Refuse what could not be tuned, before any work."""
    if not solver.needs_data:
        raise RecipeError(
            "round-to-nearest looks at no data, tuning needs some", hint="choose another `--preset`, or do not tune"
        )
    if expected().cuts:
        raise RecipeError("tuning runs in one process", hint="start it without `torchrun`, or do without `--tune` and `max`")
    if 0 < tokens <= longest:
        raise DataError("one sequence cannot be tuned on and held out at once", hint="use `--num-samples 8` or more")


def _check_masks(plan: Preparation) -> None:
    """Refuse a model whose zeros cannot be kept as a 2:4 mask, before any work."""
    dense = [t.name for t in plan.inventory.targets if not is_2_4(plan.inventory.weight(t.name))]
    if dense:
        more = f" and {len(dense) - 1} more have" if len(dense) > 1 else " has"
        raise ModelError(
            f"`{plan.checkpoint.origin}` is not 2:4 sparse: `{dense[0]}`{more} more than two nonzeros in four",
            hint="prune it first (`marlin-tools prune`), or use `--sparsity 2:4`, which prunes what is dense",
        )
