"""What a run will do, known before it does anything: the model is found, everything that headers can tell is checked.

`plan(recipe)` is the first half of every run. `plan(recipe, dry=True)` is a dry run: a model that is not on this machine is
planned from its shapes alone (`checkpoint/cards.py`), so nothing is downloaded. A run that makes one model makes its own
directory a model, one that writes several formats puts each into `<directory>/<format>/`. Read next: `execute.py`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.cards import Card, sketch
from marlin_tools.checkpoint.reader import Checkpoint, hub_name
from marlin_tools.compress.prune import plan_prune
from marlin_tools.compress.quantize import plan_quantize
from marlin_tools.data.calibrate import expect
from marlin_tools.families import find_family
from marlin_tools.recipe.recipe import (
    DENSE,
    EvaluateStage,
    ExportStage,
    FinetuneStage,
    GenerateStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    Stage,
    VerifyStage,
    settle,
)
from marlin_tools.stream.inventory import take_inventory
from marlin_tools.training.finetune import check_mask, check_pair
from marlin_tools.verification.engines import judge_engines

RUNS = Path("runs")


@dataclass(frozen=True)
class Step:
    """A stage in its place: the model that it reads, the directories that it makes by format, and what is known beforehand."""

    stage: Stage
    model: str | Path
    outputs: dict[str, Path]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do; `recipe` has every choice made, `home` is where a run that makes no model puts its result."""

    recipe: Recipe
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    home: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        """The model directories that the run leaves, in the order in which they are made."""
        return [path for step in self.steps for path in step.outputs.values()]

    def describe(self) -> list[dict[str, Any]]:
        """The steps as plain data."""
        return [
            {
                "stage": step.stage.stage,
                "model": str(step.model),
                "outputs": [str(path) for path in step.outputs.values()],
                "facts": dict(step.facts),
            }
            for step in self.steps
        ]


def plan(recipe: Recipe, out: Path | None = None, *, dry: bool = False) -> Plan:
    """Find the model, check what can be checked without work, and say what would happen; `dry` downloads no weights for it."""
    recipe, notes = settle(recipe)
    root = out or RUNS / f"{recipe.name}-{recipe.scheme}"
    homes = {name: root if len(recipe.made) == 1 else root / name for name in recipe.made}
    looker = _Looker(recipe, dry=dry)
    steps: list[Step] = []
    model: str | Path = recipe.model
    for stage in recipe.stages:
        outputs = {name: homes[name] for name in _made(stage)}
        steps.append(Step(stage, model, outputs, tuple(looker.facts(stage))))
        if outputs and not (recipe.quantize and isinstance(stage, ExportStage)):  # whose results are the same model once more
            model = next(iter(outputs.values()))
    said = (*_resolved(recipe.model), *looker.notes(), *notes)
    return Plan(recipe, tuple(steps), said, home=None if recipe.made else out)


def _made(stage: Stage) -> tuple[str, ...]:
    """What a stage writes, as in `Recipe.made`."""
    match stage:
        case PruneStage() | FinetuneStage():
            return (DENSE[stage.stage],)
        case QuantizeStage():
            return (stage.format,)
        case ExportStage():
            return stage.formats
    return ()


def _resolved(model: str) -> Iterator[str]:
    repository, revision = hub_name(model)
    if model == "demo":
        yield "`demo` is the embedded model"
    elif repository != model and not Path(model).exists():
        yield f"`{model}` is `{repository}`" + (f" at revision {revision}" if revision else "")


class _Looker:
    """What can be known of the stages of one recipe before they run."""

    def __init__(self, recipe: Recipe, *, dry: bool) -> None:
        self.recipe, self.dry = recipe, dry

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model that the recipe starts from; in a dry run perhaps only its shapes."""
        find = sketch if self.dry else Checkpoint.open
        return find(self.recipe.model, find_family)

    def notes(self) -> Iterator[str]:
        """What a dry run has not looked at."""
        if "checkpoint" in vars(self) and isinstance(self.checkpoint, Card):
            size = self.checkpoint.nbytes / 1e9
            repository, _ = hub_name(self.recipe.model)
            yield f"`{repository}` is not on this machine: planned from its shapes; a run downloads {size:.1f} GB"

    def facts(self, stage: Stage) -> Iterator[tuple[str, str]]:
        """What and how much, for people; raises what would stop the stage later."""
        match stage:
            case PruneStage():
                yield from self._prune(stage)
            case FinetuneStage():
                yield from self._finetune(stage)
            case QuantizeStage():
                yield from self._quantize(stage)
            case ExportStage():
                yield "formats", ", ".join(stage.formats)
            case EvaluateStage():
                yield "tasks", ", ".join(stage.tasks)
                yield "baseline", stage.baseline or "none"
                if self.dry:
                    yield "memory", f"{self.checkpoint.nbytes / 1e9:.1f} GB of weights for each model, if they run in 16 bits"
            case GenerateStage():
                yield "prompt", stage.prompt
            case VerifyStage():
                yield "checks", "shapes, bytes and numbers of every directory written"

    def _prune(self, stage: PruneStage) -> Iterator[tuple[str, str]]:
        planned = plan_prune(self.checkpoint, stage.settings, *self._tokens())
        yield "preset", stage.preset if stage.algorithm is None else stage.algorithm.mask
        yield from self._calibration()
        yield from planned.forecast.lines()
        yield from ((f"kept `{name}`", reason) for name, reason in planned.inventory.kept.items())

    def _finetune(self, stage: FinetuneStage) -> Iterator[tuple[str, str]]:
        name = stage.teacher or self.recipe.model
        find = sketch if self.dry else Checkpoint.open
        check_pair(self.checkpoint, find(name, find_family), stage)
        if stage is self.recipe.making[0] and not isinstance(self.checkpoint, Card):
            check_mask(self.checkpoint)
        yield "teacher", name
        text = stage.text or (self.recipe.calibrate if stage.needs_data else None)
        if text:
            yield "text", f"{text.num_samples} samples of `{text.source}`"
        if stage.sampled:
            yield "written by the teacher", f"{stage.sampled} windows of {stage.seqlen} tokens"
        yield "training", f"{stage.tokens:,} tokens, {stage.batch} sequences a step"

    def _tokens(self) -> tuple[int, int]:
        """(tokens, longest sequence) of the calibration."""
        return expect(self.recipe.calibrate, self.checkpoint) if self.recipe.calibrate else (0, 0)

    def _calibration(self) -> Iterator[tuple[str, str]]:
        text = self.recipe.calibrate
        if text:
            yield "calibration", f"{text.num_samples} samples of `{text.source}`, at most {self._tokens()[0]} tokens"

    def _quantize(self, stage: QuantizeStage) -> Iterator[tuple[str, str]]:
        recipe, checkpoint = self.recipe, self.checkpoint
        planned = plan_quantize(checkpoint, stage.settings, *self._tokens())
        for name in recipe.formats:  # what a later export could not hold is refused now
            take_inventory(checkpoint, stage.ignore, stage.group_size, name, sparse=stage.sparsity is not None)
        yield "preset", stage.preset if stage.algorithm is None else stage.algorithm.kind
        yield from self._calibration()
        yield "blocks", str(planned.inventory.blocks)
        shapes = {target.name: (target.n, target.k) for target in planned.inventory.targets}
        yield "shapes", ", ".join(f"{count} of {n} x {k}" for (n, k), count in Counter(shapes.values()).items())
        yield from planned.forecast.lines()
        yield from ((f"kept `{name}`", reason) for name, reason in planned.inventory.kept.items())
        kept = planned.inventory.kept
        for name in recipe.formats:
            for verdict in judge_engines(
                checkpoint.text_config, planned.inventory.family, shapes, kept, name, stage.group_size
            ):
                yield f"{name} in {verdict.engine} {verdict.version}", str(verdict)
