"""The engine: recipe -> plan -> result. Every verb of the command line goes through `plan.plan` and `execute`.

`execute` runs the stages in order; what is already there and matches is kept. Every directory holds the `recipe.yaml` that
makes it again. Pages for people are not made here: `report.write_pages` makes them of a `RunResult`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.journal import another_run, unfinished
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.output import OutputDirectory, check_output, put
from marlin_tools.data.calibrate import CalibrationSettings
from marlin_tools.data.sources import SOURCES, each_of
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import leads, processes
from marlin_tools.errors import OutputError, RecipeError
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.events import Emit, Event, silent
from marlin_tools.recipe.files import load
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.resources import expanded
from marlin_tools.run.plan import RUNS, Plan, Step
from marlin_tools.stage import Stage, Work
from marlin_tools.verification.verify import Verification

RECIPE = "recipe.yaml"


@dataclass
class RunResult:
    """What a run has led to. `shown` are directories that were measured, whether the run has made them or not."""

    outputs: list[Path] = field(default_factory=list)
    evaluation: Evaluation | None = None
    verifications: dict[Path, Verification] = field(default_factory=dict)
    text: str | None = None
    warnings: list[str] = field(default_factory=list)
    shown: list[Path] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(verification.ok for verification in self.verifications.values())

    def describe(self) -> dict[str, Any]:
        """As plain data; what did not happen is not in it."""
        verifications = {str(path): each.describe() for path, each in self.verifications.items()}
        content = {
            "outputs": [str(path) for path in self.outputs],
            "evaluation": self.evaluation.describe() if self.evaluation else None,
            "verification": verifications,
            "text": self.text,
        }
        return {key: value for key, value in content.items() if value} | {"ok": self.ok, "warnings": self.warnings}


def newest_run() -> Path:
    """The model directory under `runs/` that was worked on last."""
    made = [path for path in RUNS.rglob("manifest.json") if not any(".partial" in part for part in path.parts)]
    if not made:
        raise RecipeError(f"there is no model under `{RUNS}/`", hint="name a MODEL, or make one: marlin-tools quantize demo")
    return max(made, key=lambda path: (path.stat().st_mtime_ns, path)).parent


def execute(
    planned: Plan, emit: Emit = silent, *, overwrite: bool = False, resume: bool = True, start: str | None = None
) -> RunResult:
    """Run the stages. With `start`, those before it are taken as they are and the others are run again."""
    _check_processes(planned)
    check_outputs(planned)
    recipe, result = planned.recipe, RunResult()

    def hear(event: Event) -> None:
        """Pass an event on and remember warnings."""
        if event.kind == "warning":
            result.warnings.append(event.text)
        emit(event)

    for note in planned.notes:
        emit(Event("note", note))
    first, again = position(planned, start), overwrite or start is not None
    if not again:
        for step in planned.steps[first:]:
            _refuse_others(step, recipe, resume=resume)
    texts: dict[str, TokenSet] = {}
    for number, step in enumerate(planned.steps[first + 1 :], first + 1):
        if again or _works_before(planned.steps[first:number]):
            step.stage.foresee(Work(planned.steps[first].source, {}, recipe.model, recipe.calibrate, hear, texts=texts))
    for index, step in enumerate(planned.steps):
        if index < first:
            _check_kept(step, recipe)
        else:
            made = tuple(result.outputs)
            work = Work(step.source, step.outputs, recipe.model, recipe.calibrate, hear, step.prepared, again, resume, made)
            work.home, work.texts = planned.home, texts
            for name, value in step.stage.run(work).items():
                setattr(result, name, value)
            result.shown += work.shown
        for path in step.outputs.values():
            if leads():  # a result that another recipe made in the same way now belongs to this one
                put(path / RECIPE, recipe.dump())
            result.outputs.append(path)
    for path in result.outputs:  # kept results had warnings when they were made
        result.warnings += (read_manifest(path) or {}).get("warnings", [])
    result.warnings = list(dict.fromkeys(result.warnings))
    return result


def _works_before(steps: Sequence[Step]) -> bool:
    """Whether these stages take their time, rather than find what they would make."""
    made = [path for step in steps for path in step.outputs.values()]
    return not made or not all(path.is_dir() for path in made)


def _check_processes(planned: Plan) -> None:
    """Some stages know how to share their work."""
    alone = [step.stage.stage for step in planned.steps if not step.stage.shares]
    if processes() > 1 and alone:
        raise RecipeError(
            f"stage `{alone[0]}` runs in one process, `torchrun` has started {processes()}",
            hint="run it without `torchrun`; `quantize` (into one format) and `finetune` can share their work",
        )


def check_outputs(planned: Plan) -> None:
    """Every place that the run will write to, before any work: nothing of others lies there, and it can be written to."""
    if not leads():
        return
    stages, text = planned.recipe.stages, planned.recipe.calibrate
    read = [planned.recipe.model, *(each_of(text.source) if text else [])]
    read += [name for each in stages for key in ("baseline", "teacher") if (name := getattr(each, key, None))]
    read += [task.removeprefix("ppl:") for task in planned.recipe.tasks]
    there = [name for name in read if name != "demo" and expanded(name).exists()]
    for step in planned.steps:
        for path in step.outputs.values():
            check_output(path, there, overwrite=True)  # whether a result of ours may go is asked for stage by stage


def position(planned: Plan, start: str | None) -> int:
    """The number of the stage to start with."""
    stages = [step.stage.stage for step in planned.steps]
    if start is None:
        return 0
    if start not in stages:
        raise RecipeError(f"`--from {start}`: the recipe has no such stage", hint=f"its stages: {', '.join(stages)}")
    return stages.index(start)


def _check_kept(step: Step, recipe: Recipe) -> None:
    """The results of a stage that is not run again must be of this recipe."""
    for path in step.outputs.values():
        if not (path / RECIPE).is_file() or read_manifest(path) is None:
            raise OutputError(f"`{path}` holds no finished result to go on from", hint="run without `--from`")
        if _making(load(path / RECIPE), step) != _making(recipe, step):
            raise OutputError(f"`{path}` was made with other settings", hint="run without `--from`, with `--overwrite`")


def _refuse_others(step: Step, recipe: Recipe, *, resume: bool) -> None:
    """What is certainly of other settings is in the way before a text is downloaded and read, not after."""
    for path in step.outputs.values():
        if _is_another(path, step.stage, recipe):
            check_output(path)
        if resume and _began_otherwise(unfinished(path), step.stage, recipe):
            raise another_run(OutputDirectory(path).partial)


def _is_another(path: Path, stage: Stage, recipe: Recipe) -> bool:
    """Whether a result was certainly made with other settings or of another text."""
    try:
        kept = load(path / RECIPE) if (path / RECIPE).is_file() else None
    except RecipeError:
        return False  # its manifest knows what made it
    before = next((each for each in kept.stages if type(each) is type(stage)), None) if kept else None
    if kept is None or before is None:
        return False
    return stage.differs(before) or _other_text(stage.reads(recipe.calibrate), before.reads(kept.calibrate))


def _other_text(ours: CalibrationSettings | None, theirs: CalibrationSettings | None) -> bool:
    """Whether these are certainly other tokens; what a file holds is not known by its name."""
    if ours is None or theirs is None:
        return False
    lengths = {each.seqlen for each in (ours, theirs) if each.seqlen is not None and each.shape != "documents"}
    sources = [tuple(name.strip() for name in each.source.split(",")) for each in (ours, theirs)]
    named = {names for names in sources if set(names) <= SOURCES.keys()}
    return (ours.num_samples, ours.seed) != (theirs.num_samples, theirs.seed) or len(lengths) > 1 or len(named) > 1


def _began_otherwise(noted: dict[str, Any], stage: Stage, recipe: Recipe) -> bool:
    """Whether an unfinished run, of which this is noted, certainly had other settings."""
    try:
        before = type(stage).model_validate(noted["settings"])
    except (KeyError, ValueError):
        return False  # of another version, or another stage; its fingerprint tells
    ours, theirs = stage.reads(recipe.calibrate), noted.get("text")
    return stage.differs(before) or (ours is not None and theirs is not None and theirs != [ours.num_samples, ours.seed])


def _making(recipe: Recipe, step: Step) -> tuple[object, ...]:
    """The part of a recipe that decides what the weights are after a step."""
    names = [stage.stage for stage in recipe.remaking]
    last = names.index(step.stage.stage) + 1 if step.stage.stage in names else len(names)
    return recipe.model, recipe.calibrate, recipe.remaking[:last]
