"""What a run will do, known before it does anything: the model is found, everything that headers can tell is checked.

`plan(recipe)` is the first half of every run. `plan(recipe, dry=True)` is a dry run: a model that is not on this machine is
planned from its shapes alone (`checkpoint/cards.py`), so nothing is downloaded. A run that makes one model makes its own
directory a model, one that writes several formats puts each into `<directory>/<format>/`. Read next: `execute.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.cards import Card, sketch
from marlin_tools.checkpoint.reader import Checkpoint, hub_name
from marlin_tools.compress.job import Preparation
from marlin_tools.distributed.device import pick_device
from marlin_tools.errors import ModelError
from marlin_tools.families import find_family
from marlin_tools.recipe.recipe import ABOUT_CODES, Recipe, settle
from marlin_tools.resources import expanded
from marlin_tools.stage import Facts, Outlook, Source, Stage
from marlin_tools.training.finetune import FinetuneSettings
from marlin_tools.verification.engines import judge_engines
from marlin_tools.verification.verify import check_quantized

RUNS = Path("runs")


@dataclass(frozen=True)
class Step:
    """A stage in its place: the model that it reads, the directories that it makes by name, and what is known beforehand.

    prepared   what its plan found out about the model that the recipe starts from; None if it reads another one
    """

    stage: Stage
    source: Source
    outputs: dict[str, Path]
    facts: Facts
    prepared: Any = None


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
                "model": str(step.source.name),
                "outputs": [str(path) for path in step.outputs.values()],
                "facts": dict(step.facts),
            }
            for step in self.steps
        ]


def plan(recipe: Recipe, out: Path | None = None, *, dry: bool = False) -> Plan:
    """Find the model, check what can be checked without work, and say what would happen; `dry` downloads no weights for it."""
    recipe, notes = settle(recipe)
    accept = find_family if dry or recipe.remaking else None  # other stages take models that we could not compress
    find = partial(sketch if dry else Checkpoint.open, accept=accept)
    original = source = Source(recipe.model, find)
    root = out or RUNS / f"{recipe.name}-{_scheme(recipe, original)}"
    homes = {name: root if len(recipe.made) == 1 else root / name for name in recipe.made}
    steps: list[Step] = []
    first, quantized = True, False
    for stage in recipe.stages:
        outputs = {name: homes[name] for name in stage.makes}
        pick_device(getattr(stage, "device", "auto"))
        if isinstance(stage, ABOUT_CODES) and not quantized:
            _check_quantized(original)
        known = stage.plan(Outlook(original, find, recipe.calibrate, recipe.formats, first, quantized, dry))
        engines = tuple(_engines(recipe, original, known.prepared)) if stage is recipe.quantize else ()
        steps.append(Step(stage, source, outputs, known.facts + engines, known.prepared if source is original else None))
        if outputs and not (recipe.quantize and not stage.remakes):  # whose results are the same model once more
            source = Source(next(iter(outputs.values())))
        first, quantized = first and not stage.remakes, quantized or stage is recipe.quantize
    return Plan(recipe, tuple(steps), (*_about(recipe.model, original), *notes), home=None if recipe.made else out)


def _check_quantized(source: Source) -> None:
    """Refuse a model without codes before other stages have worked on it; what is wrong with a damaged one, `verify` says."""
    try:
        check_quantized(source.checkpoint)
    except ModelError:
        if not expanded(source.name).is_dir():
            raise


def _scheme(recipe: Recipe, source: Source) -> str:
    """What is finetuned alone has its zeros from the model: one that is not quantised can only be 2:4."""
    alone = len(recipe.remaking) == 1 and isinstance(recipe.remaking[0], FinetuneSettings)
    return f"2of4-{recipe.scheme}" if alone and source.checkpoint.quantization is None else recipe.scheme


def _engines(recipe: Recipe, source: Source, known: Preparation) -> Iterator[tuple[str, str]]:
    """Which engines will load each format that the recipe writes."""
    inventory = known.inventory
    shapes = {target.name: (target.n, target.k) for target in inventory.targets}
    assert recipe.quantize is not None, "engines are asked about quantised models"
    scheme = known.group_sizes, recipe.quantize.activations
    for name in recipe.formats:
        for verdict in judge_engines(source.checkpoint.text_config, inventory.family, shapes, inventory.kept, name, *scheme):
            yield f"{name} in {verdict.engine} {verdict.version}", str(verdict)


def _about(model: str, source: Source) -> Iterator[str]:
    """What its name means, and what a dry run has not looked at."""
    repository, revision = hub_name(model)
    if model == "demo":
        yield "`demo` is the embedded model"
    elif repository != model and not Path(model).exists():
        yield f"`{model}` is `{repository}`" + (f" at revision {revision}" if revision else "")
    if isinstance(source.opened, Card):
        size = source.opened.nbytes / 1e9
        yield f"`{repository}` is not on this machine: planned from its shapes; a run downloads {size:.1f} GB"
