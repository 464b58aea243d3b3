"""Recipes that end in PASS or FAIL: run each, hold its scores against what it expects, write down what came of it.

    comparison = reproduce(["llama2-paper"])      # all rows of a table; comparison.code is the exit code

Controls, usually the unquantised models, run first; a recipe whose control does not stand is not run. Whatever cannot be had
here, a model, a dataset, memory, is said with its reason and never passes. Stages that are done are reused, as with `run`.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.output import explained, folder, put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import MarlinToolsError, NumericalError, RecipeError
from marlin_tools.evaluation.evaluate import unavailable
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.evaluation.stages import EvaluateStage
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.recipe.files import load_all
from marlin_tools.recipe.recipe import Expectation, Recipe
from marlin_tools.report.comparison import Comparison, Finding, Outcome, as_markdown
from marlin_tools.report.comparison_page import comparison_page
from marlin_tools.run.execute import RunResult, execute
from marlin_tools.run.plan import RUNS, plan

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
) -> Comparison:
    """Run everything, then write report.md, report.html, report.json and a log for each recipe into `out`."""
    refs, overrides = tuple(map(str, refs)), tuple(overrides)
    recipes = collect(refs, overrides)
    name = ", ".join(Path(ref).stem for ref in refs)
    home = folder(out or HOME / "+".join(Path(ref).stem for ref in refs)[:100])
    outcomes: dict[str, Outcome] = {}
    for recipe in recipes:
        emit(Event("stage", f"{recipe.name} ({len(outcomes) + 1} of {len(recipes)})"))
        with _log(home / f"{recipe.name}.log", emit) as heard:
            outcome = _Row(recipe, heard, overwrite=overwrite).run(outcomes.get(recipe.control or ""))
            for finding in outcome.findings:
                heard(Event("note", str(finding)))
        outcomes[recipe.name] = outcome
        emit(Event("result", f"{recipe.name}: {outcome.verdict}"))
    comparison = Comparison(name, tuple(outcomes.values()), overrides)
    put(home / "report.md", as_markdown(comparison))
    put(home / "report.html", comparison_page(comparison))
    put(home / "report.json", json.dumps(comparison.describe(), indent=1, allow_nan=False) + "\n")
    emit(Event("result", f"`{home / 'report.html'}` shows it", data={"page": str(home / "report.html")}))
    return comparison


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

    def __init__(self, recipe: Recipe, emit: Emit, *, overwrite: bool) -> None:
        self.recipe, self.emit, self.overwrite = recipe, emit, overwrite

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
            findings=tuple(_findings(recipe, evaluation, missing or {}, problem)),
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


def _findings(recipe: Recipe, evaluation: Evaluation | None, missing: dict[str, str], problem: str) -> Iterator[Finding]:
    """A finding for everything expected, or for every score where nothing is; and for every task that was not run."""
    expected = {each.task for each in recipe.expect}
    for each in recipe.expect:
        yield _finding(each, evaluation, missing.get(each.task, problem))
    for score in evaluation.scores if evaluation and not recipe.expect else ():
        if score.part_of is None:
            yield Finding(score.task, score.metric, score.value, score.stderr)
    for task in recipe.tasks:
        if task not in expected and (evaluation is None or task in missing):
            yield Finding(task, "", reason=missing.get(task, problem))


def _finding(expected: Expectation, evaluation: Evaluation | None, reason: str) -> Finding:
    known = Finding(
        expected.task, expected.metric or "", expected=expected.value, tolerance=expected.tolerance, note=expected.note
    )
    for score in evaluation.scores if evaluation else ():
        if score.task == expected.task and expected.metric in (None, score.metric):
            return replace(known, metric=score.metric, measured=score.value, stderr=score.stderr)
    return replace(known, reason=f"no metric `{expected.metric}` was measured" if evaluation and not reason else reason)
