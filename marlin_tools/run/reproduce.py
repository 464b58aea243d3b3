"""Recipes that end in PASS or FAIL: run each, hold its scores against what it expects, write down what came of it.

    comparison = reproduce(["llama2-paper"])      # all rows of a table; comparison.code is the exit code

Controls, usually the unquantised models, run first; a recipe whose control does not stand is not run. Whatever cannot be had
here, a model, a dataset, memory, is said with its reason and never passes. Stages that are done are reused, as with `run`.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.output import ELSEWHERE, check_apart, explained, folder
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import MarlinToolsError, NumericalError, OutputError
from marlin_tools.evaluation.evaluate import unavailable
from marlin_tools.evaluation.record import EvaluateStage
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.recipe.files import add, load_all
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.execute import RunResult, check_outputs, execute
from marlin_tools.run.plan import RUNS, Plan, plan
from marlin_tools.run.verdict import Comparison, Outcome, findings

HOME = RUNS / "reproduce"

_DIR = re.compile("(choose )?another `-o DIR`")


def collect(refs: Iterable[str | Path], overrides: Iterable[str] = ()) -> list[Recipe]:
    """All recipes that are named, each once, after its control."""
    overrides = tuple(overrides)
    found: dict[str, Recipe] = {}
    for recipe in (each for ref in refs for each in load_all(ref, overrides)):
        add(found, recipe)
    return list(found.values())


def rehearse(recipes: Iterable[Recipe]) -> list[Plan]:
    """What each will do; refuses what would stop one of them. Nothing is written."""
    planned = [plan(recipe, _home(recipe), dry=True) for recipe in recipes]
    for each in planned:
        check_outputs(each)
    return planned


def _home(recipe: Recipe) -> Path | None:
    """Where a recipe that makes no model puts what it measures; models have their usual places."""
    return None if recipe.made else RUNS / recipe.name


def home_of(refs: Iterable[str | Path], out: Path | None) -> Path:
    """Where the report and the logs go: in no result, which has a report of its own."""
    home = out or HOME / "+".join(Path(ref).stem for ref in refs)[:100]
    check_apart(home / "report.html")
    return home


def reproduce(
    refs: Iterable[str | Path],
    out: Path | None = None,
    *,
    overrides: Iterable[str] = (),
    emit: Emit = silent,
    overwrite: bool = False,
    finished: Callable[[RunResult], object] = lambda _result: None,
) -> Comparison:
    """Run everything, write a log for each recipe into `out`, and hand every result to `finished`."""
    refs, overrides = tuple(map(str, refs)), tuple(overrides)
    recipes = collect(refs, overrides)
    name = ", ".join(Path(ref).stem for ref in refs)
    home = folder(home_of(refs, out))
    outcomes: dict[str, Outcome] = {}
    with _alone(home):
        for recipe in recipes:
            emit(Event("stage", f"{recipe.name} ({len(outcomes) + 1} of {len(recipes)})"))
            with _log(home / f"{recipe.name}.log", emit) as heard:
                outcome = _attempt(recipe, outcomes.get(recipe.control or ""), heard, finished, overwrite=overwrite)
                for finding in outcome.findings:
                    heard(Event("note", str(finding)))
            outcomes[recipe.name] = outcome
            emit(Event("result", f"{recipe.name}: {outcome.verdict}"))
    return Comparison(name, tuple(outcomes.values()), overrides, home)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One run at a time writes its logs there."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(f"another run writes its logs to `{home}`", hint=f"wait for it, or {ELSEWHERE}") from error
    finally:
        os.close(descriptor)


@contextmanager
def _log(path: Path, emit: Emit) -> Iterator[Emit]:
    """Pass events on and write each down, with the seconds since the beginning."""
    begin = time.perf_counter()
    try:
        file = path.open("w", encoding="utf-8", buffering=1)  # line by line: a run that is killed has said where it was
    except OSError as error:
        raise explained(error, path) from error
    with file:

        def heard(event: Event) -> None:
            count = f" {event.done}/{event.total}" if event.total else ""
            data = " " + json.dumps(event.data, default=str) if event.data else ""
            file.write(f"{time.perf_counter() - begin:9.2f}  {event.kind:<8}  {event.text}{count}{data}\n")
            emit(event)

        yield heard


def _attempt(
    recipe: Recipe, control: Outcome | None, emit: Emit, finished: Callable[[RunResult], object], *, overwrite: bool
) -> Outcome:
    """Measure what can be measured; a failure of the mathematics fails, anything that cannot be had is not run."""
    if control is not None and not control.stands:
        return _outcome(recipe, f"its control `{control.name}` does not stand: {control.verdict}")
    try:
        missing = _missing(recipe)
        possible = _without(recipe, missing)
        if not possible.tasks and recipe.tasks:
            return _outcome(recipe, "; ".join(missing.values()), missing)
        result = execute(plan(possible, _home(possible)), emit, overwrite=overwrite)
        finished(result)
    except MarlinToolsError as error:
        hint = error.hint and _DIR.sub("give the recipe another `name`", error.hint)  # `-o` is where the report goes
        told = error.message + (f"; {hint}" if hint else "")
        return _outcome(recipe, told, failed=isinstance(error, NumericalError))
    damaged = [(path, found.checks) for path, found in result.verifications.items() if not found.ok]
    failed = [f"`{path}` fails {', '.join(f'`{each.name}`' for each in checks if not each.ok)}" for path, checks in damaged]
    return _outcome(recipe, "; ".join(failed), missing, result, failed=bool(failed))


def _missing(recipe: Recipe) -> dict[str, str]:
    """The tasks whose data cannot be had, before hours are spent on the others."""
    checkpoint = Checkpoint.open(recipe.model, accept=find_family)
    stages = [stage for stage in recipe.stages if isinstance(stage, EvaluateStage)]
    return unavailable(checkpoint, stages[0]) if stages else {}


def _outcome(
    recipe: Recipe,
    problem: str,
    missing: Mapping[str, str] | None = None,
    result: RunResult | None = None,
    *,
    failed: bool = False,
) -> Outcome:
    result = result or RunResult()
    found = tuple(findings(recipe, result.evaluation, missing or {}, problem))
    outputs = tuple(map(str, result.outputs))
    return Outcome(recipe, found, problem, failed, outputs, tuple(result.warnings), result.evaluation)


def _without(recipe: Recipe, missing: dict[str, str]) -> Recipe:
    """The recipe without the tasks that cannot be had; a stage that has none left is not run."""
    stages: list[Any] = []
    for stage in recipe.stages:
        if missing and isinstance(stage, EvaluateStage):
            tasks = tuple(task for task in stage.tasks if task not in missing)
            stages += [stage.model_copy(update={"tasks": tasks})] if tasks else []
        else:
            stages.append(stage)
    return recipe.model_copy(update={"stages": tuple(stages)})
