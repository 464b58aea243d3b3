"""Measured numbers beside expected ones: a `Finding` for each number, an `Outcome` for each recipe, a `Comparison` of all.

A verdict is PASS or FAIL where a tolerance is known, `reported` where there is nothing to judge by, and `not run` where
something could not be had. What was not run never passes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from marlin_tools.evaluation.scores import Evaluation, finite, spell
from marlin_tools.recipe.recipe import Expectation, Recipe

Verdict = Literal["PASS", "FAIL", "reported", "not run"]


@dataclass(frozen=True)
class Finding:
    """One number. `reason` says why there is no measured one, `note` what there is to know about the expected one."""

    task: str
    metric: str
    measured: float | None = None
    stderr: float | None = None
    expected: float | None = None
    tolerance: float | None = None
    note: str = ""
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus expected."""
        return None if self.measured is None or self.expected is None else self.measured - self.expected

    @property
    def verdict(self) -> Verdict:
        """PASS if the difference is within the tolerance; a number that is not finite is not."""
        if self.measured is None:
            return "not run"
        if self.difference is None or self.tolerance is None:
            return "reported"
        return "PASS" if abs(self.difference) <= self.tolerance else "FAIL"

    def __str__(self) -> str:
        """One line for a log."""
        told = f"{self.task} {self.metric}".rstrip()
        told += "" if self.measured is None else f" {spell(self.measured, self.stderr)}"
        told += "" if self.expected is None else f", expected {self.expected:g}"
        told += "" if self.tolerance is None else f", ±{self.tolerance:g} allowed"
        return f"{self.verdict}: {told}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe.

    problem      why it was not run to its end, or what failed although it was
    failed       whether that is a failure of ours, rather than something that could not be had
    evaluation   everything that was measured
    """

    recipe: Recipe
    findings: tuple[Finding, ...]
    problem: str = ""
    failed: bool = False
    outputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """That of the recipe."""
        return self.recipe.name

    @property
    def log(self) -> str:
        """The file beside the report that holds every event of the run."""
        return f"{self.name}.log"

    @property
    def verdict(self) -> Verdict:
        """The worst that can be said: a failure, then what is missing; PASS only if something was judged."""
        verdicts = [finding.verdict for finding in self.findings]
        if self.failed or "FAIL" in verdicts:
            return "FAIL"
        if self.problem or "not run" in verdicts:
            return "not run"
        return "PASS" if "PASS" in verdicts else "reported"

    @property
    def stands(self) -> bool:
        """Whether recipes that have this one as their control may run: something was measured and nothing failed."""
        measured = any(finding.measured is not None for finding in self.findings)
        return measured and self.verdict != "FAIL" and not self.problem

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        findings = [
            {**asdict(each), "measured": finite(each.measured), "difference": finite(each.difference), "verdict": each.verdict}
            for each in self.findings
        ]
        evaluation = self.evaluation.describe() if self.evaluation else None
        return {
            "name": self.name,
            "model": self.recipe.model,
            "source": self.recipe.source,
            "deviations": self.recipe.deviations,
            "problem": self.problem,
            "control": self.recipe.control,
            "outputs": self.outputs,
            "verdict": self.verdict,
            "warnings": self.warnings,
            "findings": findings,
            "evaluation": evaluation,
        }


@dataclass(frozen=True)
class Comparison:
    """All recipes that were asked for and their controls; `overrides` are settings that differ from what they say.

    The logs of the runs are in the directory `home`.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    overrides: tuple[str, ...] = ()
    home: Path = Path()

    @property
    def code(self) -> int:
        """The exit code: 1 if anything failed, 2 if anything was not run, 0 otherwise."""
        verdicts = {outcome.verdict for outcome in self.outcomes}
        return 1 if "FAIL" in verdicts else 2 if "not run" in verdicts else 0

    @property
    def verdict(self) -> Verdict:
        """Of all together."""
        if self.code:
            return "FAIL" if self.code == 1 else "not run"
        return "PASS" if self.count("PASS") else "reported"

    def count(self, verdict: Verdict) -> int:
        """How many recipes have it."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        rows = [outcome.describe() for outcome in self.outcomes]
        return {"name": self.name, "code": self.code, "overrides": self.overrides, "recipes": rows}


def findings(recipe: Recipe, evaluation: Evaluation | None, missing: Mapping[str, str], problem: str) -> Iterator[Finding]:
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
