"""Recipes that end in PASS or FAIL: run each, hold its scores against what it expects, write down what came of it.

    comparison = reproduce(["llama2-paper"])      # all rows of a table; comparison.code is the exit code

Controls, usually the unquantised models, run first; a recipe whose control does not stand is not run. Whatever cannot be had
here, a model, a dataset, memory, is said with its reason and never passes. Stages that are done are reused, as with `run`.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.output import explained, folder
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import MarlinToolsError, NumericalError, RecipeError
from marlin_tools.evaluation.evaluate import unavailable
from marlin_tools.evaluation.stages import EvaluateStage
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.recipe.files import load_all
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.execute import RunResult, execute
from marlin_tools.run.plan import RUNS, plan
from marlin_tools.run.verdict import Comparison, Outcome, findings

HOME = RUNS / "reproduce"


def collect(refs: Iterable[str | Path], overrides: Iterable[str] = ()) -> list[Recipe]:
    """All recipes that are named, each once, after its control."""
    overrides = tuple(overrides)
    found: dict[str, Recipe] = {}
    for recipe in (each for ref in refs for each in load_all(ref, overrides)):
        if found.setdefault(recipe.name, recipe) != recipe:
            raise RecipeError(
                f"two different recipes are called `{recipe.name}`", hint="rename one, or reproduce them one by one"
            )
    return list(found.values())


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
    home = folder(out or HOME / "+".join(Path(ref).stem for ref in refs)[:100])
    outcomes: dict[str, Outcome] = {}
    for recipe in recipes:
        emit(Event("stage", f"{recipe.name} ({len(outcomes) + 1} of {len(recipes)})"))
        with _log(home / f"{recipe.name}.log", emit) as heard:
            outcome = _Row(recipe, heard, finished, overwrite=overwrite).run(outcomes.get(recipe.control or ""))
            for finding in outcome.findings:
                heard(Event("note", str(finding)))
        outcomes[recipe.name] = outcome
        emit(Event("result", f"{recipe.name}: {outcome.verdict}"))
    return Comparison(name, tuple(outcomes.values()), overrides, home)


@contextmanager
def _log(path: Path, emit: Emit) -> Iterator[Emit]:
    """Pass events on and write each down, with the seconds since the beginning."""
    begin = time.perf_counter()
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise explained(error, path) from error
    with file:

        def heard(event: Event) -> None:
            count = f" {event.done}/{event.total}" if event.total else ""
            data = " " + json.dumps(event.data, default=str) if event.data else ""
            file.write(f"{time.perf_counter() - begin:9.2f}  {event.kind:<8}  {event.text}{count}{data}\n")
            emit(event)

        yield heard


class _Row:
    """One recipe on its way to an outcome."""

    def __init__(self, recipe: Recipe, emit: Emit, finished: Callable[[RunResult], object], *, overwrite: bool) -> None:
        self.recipe, self.emit, self.finished, self.overwrite = recipe, emit, finished, overwrite

    def run(self, control: Outcome | None) -> Outcome:
        """Measure what can be measured; a failure of the mathematics fails, anything that cannot be had is not run."""
        if control is not None and not control.stands:
            return self._outcome(problem=f"its control `{control.name}` does not stand: {control.verdict}")
        try:
            missing = self._missing()
            recipe = _without(self.recipe, missing)
            if not recipe.tasks and self.recipe.tasks:
                return self._outcome(problem="; ".join(missing.values()), missing=missing)
            home = None if recipe.formats else RUNS / recipe.name
            result = execute(plan(recipe, home), self.emit, overwrite=self.overwrite)
            self.finished(result)
        except NumericalError as error:
            return self._outcome(problem=_told(error), failed=True)
        except MarlinToolsError as error:
            return self._outcome(problem=_told(error))
        damaged = [
            f"`{path}` fails {_failed(verification)}"
            for path, verification in result.verifications.items()
            if not verification.ok
        ]
        return self._outcome(result, missing, problem="; ".join(damaged), failed=bool(damaged))

    def _missing(self) -> dict[str, str]:
        """The tasks whose data cannot be had, before hours are spent on the others."""
        checkpoint = Checkpoint.open(self.recipe.model, accept=find_family)
        found: dict[str, str] = {}
        for stage in self.recipe.stages:
            if isinstance(stage, EvaluateStage):
                found |= unavailable(checkpoint, stage)
        return found

    def _outcome(
        self,
        result: RunResult | None = None,
        missing: dict[str, str] | None = None,
        *,
        problem: str = "",
        failed: bool = False,
    ) -> Outcome:
        recipe = self.recipe
        evaluation = result.evaluation if result else None
        return Outcome(
            name=recipe.name,
            model=recipe.model,
            description=recipe.description,
            source=recipe.source,
            deviations=recipe.deviations,
            findings=tuple(findings(recipe, evaluation, missing or {}, problem)),
            log=f"{recipe.name}.log",
            problem=problem,
            failed=failed,
            control=recipe.control,
            outputs=tuple(map(str, result.outputs)) if result else (),
            warnings=tuple(result.warnings) if result else (),
            evaluation=evaluation,
        )


def _told(error: MarlinToolsError) -> str:
    """What happened, and what can be done."""
    return error.message + (f"; {error.hint}" if error.hint else "")


def _failed(verification: object) -> str:
    return ", ".join(f"`{check.name}`" for check in getattr(verification, "checks", ()) if not check.ok)


def _without(recipe: Recipe, missing: dict[str, str]) -> Recipe:
    """The recipe without the tasks that cannot be had; a stage that has none left is not run."""
    if not missing:
        return recipe
    stages: list[Any] = []
    for stage in recipe.stages:
        if isinstance(stage, EvaluateStage):
            tasks = tuple(task for task in stage.tasks if task not in missing)
            stages += [stage.model_copy(update={"tasks": tasks})] if tasks else []
        else:
            stages.append(stage)
    return recipe.model_copy(update={"stages": tuple(stages)})
