"""The engine: recipe -> plan -> result. Every verb of the command line goes through these two functions.

`plan` changes nothing: it finds the model, checks everything that headers can tell, and says what would be read, written and
spent. `execute` runs the stages in order. A run that makes one model makes its own directory a model, one that writes several
formats puts each into `<directory>/<format>/`; `evaluation.json` lies beside the weights that were measured, and every
directory holds the `recipe.yaml` that makes it again. What is already there and matches is kept.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint import ALIASES, Checkpoint
from marlin_tools.errors import OutputError, RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.journal import fingerprint_of
from marlin_tools.manifest import read_manifest, versions
from marlin_tools.recipe import (
    EvaluateStage,
    ExportStage,
    GenerateStage,
    QuantizeStage,
    Recipe,
    Stage,
    VerifyStage,
    load,
    settle,
)
from marlin_tools.resources import demo_dir
from marlin_tools.stages.calibrate import calibrate, expect
from marlin_tools.stages.engines import judge_engines
from marlin_tools.stages.evaluate import evaluate
from marlin_tools.stages.export import export
from marlin_tools.stages.generate import generate
from marlin_tools.stages.inventory import take_inventory
from marlin_tools.stages.quantize import plan_quantize, quantize
from marlin_tools.stages.scores import Evaluation, Score
from marlin_tools.stages.verify import Verification, verify

RUNS = Path("runs")
RECIPE = "recipe.yaml"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Step:
    """A stage in its place: the model that it reads, the directories that it makes by format, and what is known beforehand."""

    stage: Stage
    model: str | Path
    outputs: dict[str, Path]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do; `recipe` has every choice made."""

    recipe: Recipe
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

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


@dataclass
class RunResult:
    """What a run has led to."""

    outputs: list[Path] = field(default_factory=list)
    evaluation: Evaluation | None = None
    verifications: dict[Path, Verification] = field(default_factory=dict)
    text: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(verification.ok for verification in self.verifications.values())

    def describe(self) -> dict[str, Any]:
        """As plain data; what did not happen is not in it."""
        verifications = {str(path): {"ok": each.ok, **asdict(each)} for path, each in self.verifications.items()}
        content = {
            "outputs": [str(path) for path in self.outputs],
            "evaluation": self.evaluation.describe() if self.evaluation else None,
            "verification": verifications,
            "text": self.text,
        }
        return {key: value for key, value in content.items() if value} | {"ok": self.ok, "warnings": self.warnings}


def newest_run() -> Path:
    """The model directory under `runs/` that was finished last."""
    made = [path for path in RUNS.rglob("manifest.json") if not any(".partial" in part for part in path.parts)]
    if not made:
        raise RecipeError(f"there is no model under `{RUNS}/`", hint="name a MODEL, or make one: marlin-tools quantize demo")
    return max(made, key=lambda path: (path.stat().st_mtime_ns, path)).parent


def plan(recipe: Recipe, out: Path | None = None) -> Plan:
    """Find the model, check what can be checked without work, and say what would happen."""
    recipe, notes = settle(recipe)
    root = out or RUNS / f"{recipe.name}-{recipe.scheme}"
    homes = {name: root if len(recipe.formats) == 1 else root / name for name in recipe.formats}
    steps: list[Step] = []
    model: str | Path = recipe.model
    for stage in recipe.stages:
        names = stage.formats if isinstance(stage, ExportStage) else (stage.format,) if isinstance(stage, QuantizeStage) else ()
        outputs = {name: homes[name] for name in names}
        steps.append(Step(stage, model, outputs, tuple(_facts(stage, recipe))))
        model = next(iter(homes.values())) if outputs else model
    return Plan(recipe, tuple(steps), tuple(_resolved(recipe.model)) + tuple(notes))


def _resolved(model: str) -> Iterator[str]:
    if model in ALIASES:
        yield f"`{model}` is `{ALIASES[model]}`"
    elif model == "demo":
        yield "`demo` is the embedded model"


def _facts(stage: Stage, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What is known of a stage before it runs; raises what would stop it later."""
    match stage:
        case QuantizeStage():
            yield from _quantize_facts(stage, recipe)
        case ExportStage():
            yield "formats", ", ".join(stage.formats)
        case EvaluateStage():
            yield "tasks", ", ".join(stage.tasks)
            yield "baseline", stage.baseline or "none"
        case GenerateStage():
            yield "prompt", stage.prompt
        case VerifyStage():
            yield "checks", "shapes, bytes and numbers of every directory written"


def _quantize_facts(stage: QuantizeStage, recipe: Recipe) -> Iterator[tuple[str, str]]:
    checkpoint = Checkpoint.open(recipe.model, accept=find_family)
    tokens, longest = expect(recipe.calibrate, checkpoint) if recipe.calibrate else (0, 0)
    planned = plan_quantize(checkpoint, stage.settings, tokens, longest)
    for name in recipe.formats:  # what a later export could not hold is refused now
        take_inventory(checkpoint, stage.ignore, stage.group_size, name)
    yield "preset", stage.preset if stage.algorithm is None else stage.algorithm.kind
    if recipe.calibrate:
        yield "calibration", f"{recipe.calibrate.num_samples} samples of `{recipe.calibrate.source}`, at most {tokens} tokens"
    yield "blocks", str(planned.inventory.blocks)
    yield from planned.forecast.lines()
    yield from ((f"kept `{name}`", reason) for name, reason in planned.inventory.kept.items())
    shapes = {target.name: (target.n, target.k) for target in planned.inventory.targets}
    for name in recipe.formats:
        kept = planned.inventory.kept
        for verdict in judge_engines(checkpoint.config, planned.inventory.family, shapes, kept, name, stage.group_size):
            yield f"{name} in {verdict.engine} {verdict.version}", str(verdict)


def execute(
    planned: Plan, emit: Emit = silent, *, overwrite: bool = False, resume: bool = True, start: str | None = None
) -> RunResult:
    """Run the stages. With `start`, those before it are taken as they are and the others are run again."""
    run = _Run(planned.recipe, emit, resume=resume)
    for note in planned.notes:
        emit(Event("note", note))
    first = _position(planned, start)
    for index, step in enumerate(planned.steps):
        if index < first:
            run.adopt(step)
        else:
            run.perform(step, overwrite=overwrite or start is not None)
    return run.finish()


def _position(planned: Plan, start: str | None) -> int:
    stages = [step.stage.stage for step in planned.steps]
    if start is None:
        return 0
    if start not in stages:
        raise RecipeError(f"`--from {start}`: the recipe has no such stage", hint=f"its stages: {', '.join(stages)}")
    return stages.index(start)


class _Run:
    """One run in progress."""

    def __init__(self, recipe: Recipe, emit: Emit, *, resume: bool) -> None:
        self.recipe, self.resume = recipe, resume
        self.result = RunResult()
        self._emit = emit

    def emit(self, event: Event) -> None:
        """Pass an event on and remember warnings."""
        if event.kind == "warning":
            self.result.warnings.append(event.text)
        self._emit(event)

    def adopt(self, step: Step) -> None:
        """Take the results of a stage that is not run again, if they are of this recipe."""
        for path in step.outputs.values():
            if not (path / RECIPE).is_file() or read_manifest(path) is None:
                raise OutputError(f"`{path}` holds no finished result to go on from", hint="run without `--from`")
            found = load(path / RECIPE)
            if _making(found) != _making(self.recipe):
                raise OutputError(f"`{path}` was made with other settings", hint="run without `--from`, with `--overwrite`")
            self._keep(path)

    def perform(self, step: Step, *, overwrite: bool) -> None:
        """Run one stage."""
        match step.stage:
            case QuantizeStage() as stage:
                self._quantize(stage, step, overwrite=overwrite)
            case ExportStage():
                for name, path in step.outputs.items():
                    export(step.model, name, path, emit=self.emit, overwrite=overwrite)
                    self._keep(path)
            case EvaluateStage() as stage:
                self._evaluate(stage, step, overwrite=overwrite)
            case VerifyStage():
                for path in self.result.outputs or [Path(step.model)]:
                    self.result.verifications[path] = verify(path, emit=self.emit)
            case GenerateStage() as stage:
                self.result.text = generate(step.model, stage.prompt, stage.settings, emit=self.emit)

    def finish(self) -> RunResult:
        """The result, with the warnings that kept results had when they were made."""
        for path in self.result.outputs:
            self.result.warnings += (read_manifest(path) or {}).get("warnings", [])
        self.result.warnings = list(dict.fromkeys(self.result.warnings))
        return self.result

    def _quantize(self, stage: QuantizeStage, step: Step, *, overwrite: bool) -> None:
        (path,) = step.outputs.values()
        tokens = None
        if self.recipe.calibrate is not None:
            tokens = calibrate(self.recipe.calibrate, Checkpoint.open(step.model), emit=self.emit)
        quantize(step.model, tokens, stage.settings, path, emit=self.emit, overwrite=overwrite, resume=self.resume)
        self._keep(path)

    def _keep(self, path: Path) -> None:
        """Count `path` among the results; a result that another recipe made in the same way now belongs to this one."""
        _write(path / RECIPE, self.recipe.dump())
        self.result.outputs.append(path)

    def _evaluate(self, stage: EvaluateStage, step: Step, *, overwrite: bool) -> None:
        """Measure, or take over an earlier measurement of the same weights on the same text."""
        checkpoint = Checkpoint.open(step.model)
        target = checkpoint.path / EVALUATION if read_manifest(checkpoint.path) else None
        run = _evaluation_fingerprint(stage, checkpoint)
        if target and not overwrite and (found := _read(target)).get("fingerprint") == run:
            self.emit(Event("note", f"`{target}` already holds this evaluation; nothing to do"))
            self.result.evaluation = _restore(found)
            return
        self.result.evaluation = evaluate(checkpoint, stage.settings, baseline=stage.baseline, emit=self.emit)
        if target:
            content = {"fingerprint": run, **self.result.evaluation.describe()}
            del content["times"]  # the only part that differs from run to run
            _write(target, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _making(recipe: Recipe) -> tuple[object, ...]:
    """The part of a recipe that decides what the weights are."""
    return recipe.model, recipe.calibrate, recipe.quantize


def _evaluation_fingerprint(stage: EvaluateStage, checkpoint: Checkpoint) -> str:
    """Everything that decides the numbers: weights, settings, versions and the contents of local texts and tasks."""
    texts = [Path(task.removeprefix("ppl:")) for task in stage.tasks if task.startswith("ppl:")]
    files = [*texts, *(path for folder in (demo_dir() / "tasks", *stage.include_path) for path in sorted(folder.rglob("*")))]
    return fingerprint_of(
        model=checkpoint.fingerprint,
        baseline=Checkpoint.open(stage.baseline).fingerprint if stage.baseline else None,
        settings=stage.model_dump(mode="json"),
        files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
        versions=versions(),
    )


def _read(path: Path) -> dict[str, Any]:
    """An earlier evaluation; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _restore(content: dict[str, Any]) -> Evaluation:
    """An evaluation from what `describe` wrote."""
    scores = tuple(Score(**{each.name: score[each.name] for each in fields(Score)}) for score in content["scores"])
    kept = {name: content[name] for name in ("model", "baseline", "settings", "versions")}
    return Evaluation(scores=scores, notes=tuple(content["notes"]), seconds=0.0, **kept)


def _write(path: Path, text: str) -> None:
    """Put a small file beside a finished result, at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
