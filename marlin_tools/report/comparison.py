"""Measured numbers beside expected ones: a `Finding` for each number, an `Outcome` for each recipe, a `Comparison` of all.

A verdict is PASS or FAIL where a tolerance is known, `reported` where there is nothing to judge by, and `not run` where
something could not be had. What was not run never passes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from marlin_tools.evaluation.scores import Evaluation, finite, spell
from marlin_tools.report.text import table

Verdict = Literal["PASS", "FAIL", "reported", "not run"]

COLUMNS = ("recipe", "task", "metric", "measured", "published", "difference", "allowed", "verdict")


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
    log          the file beside the report that holds every event of the run
    """

    name: str
    model: str
    description: str
    source: str
    deviations: tuple[str, ...]
    findings: tuple[Finding, ...]
    log: str
    problem: str = ""
    failed: bool = False
    control: str | None = None
    outputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    evaluation: Evaluation | None = None

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
        names = ("name", "model", "source", "deviations", "problem", "control", "outputs")
        own = {name: getattr(self, name) for name in names}
        return {**own, "verdict": self.verdict, "warnings": self.warnings, "findings": findings, "evaluation": evaluation}


@dataclass(frozen=True)
class Comparison:
    """All recipes that were asked for and their controls; `overrides` are settings that differ from what they say."""

    name: str
    outcomes: tuple[Outcome, ...]
    overrides: tuple[str, ...] = ()

    @property
    def code(self) -> int:
        """The exit code: 1 if anything failed, 2 if anything was not run, 0 otherwise."""
        verdicts = {outcome.verdict for outcome in self.outcomes}
        return 1 if "FAIL" in verdicts else 2 if "not run" in verdicts else 0

    def count(self, verdict: Verdict) -> int:
        """How many recipes have it."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        rows = [outcome.describe() for outcome in self.outcomes]
        return {"name": self.name, "code": self.code, "overrides": self.overrides, "recipes": rows}


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A line for each finding, in the order of `COLUMNS`."""
    lines = []
    for outcome in outcomes:
        lines += [_line(outcome.name, finding) for finding in outcome.findings]
        if not outcome.findings:
            lines.append([outcome.name, "", "", "", "", "", "", outcome.verdict])
    return lines


def _line(name: str, finding: Finding) -> list[str]:
    measured = "" if finding.measured is None else spell(finding.measured, finding.stderr)
    allowed = "" if finding.tolerance is None else f"±{finding.tolerance:g}"
    difference = "" if finding.difference is None else spell(finding.difference, sign="+")
    expected = "" if finding.expected is None else spell(finding.expected)
    return [name, finding.task, finding.metric, measured, expected, difference, allowed, finding.verdict]


def remarks(outcome: Outcome) -> list[str]:
    """What has to be said about an outcome besides its numbers."""
    lines = [f"{'FAIL' if outcome.failed else 'not run'}: {outcome.problem}"] if outcome.problem else []
    lines += [f"`{each.task}` was not run: {each.reason}" for each in outcome.findings if each.reason and not outcome.problem]
    lines += [
        f"FAIL: `{each.task}` {each.metric} is {each.difference:+.4f} from {each.expected:g}, ±{each.tolerance:g} allowed"
        for each in outcome.findings
        if each.verdict == "FAIL"
    ]
    return lines + [f"`{each.task}`: {each.note}" for each in outcome.findings if each.note]


def as_text(comparison: Comparison) -> str:
    """For the terminal: the table, then what is wrong."""
    parts = [table(COLUMNS, rows(comparison.outcomes))]
    wrong = [outcome for outcome in comparison.outcomes if outcome.verdict in {"FAIL", "not run"}]
    parts += [f"{outcome.name}: {line}" for outcome in wrong for line in remarks(outcome)]
    return "\n\n".join([parts[0], *(["\n".join(parts[1:])] if parts[1:] else []), _total(comparison)])


def _total(comparison: Comparison) -> str:
    verdicts: tuple[Verdict, ...] = ("PASS", "FAIL", "reported", "not run")
    return ", ".join(f"{comparison.count(each)} {each}" for each in verdicts if comparison.count(each))


def as_markdown(comparison: Comparison) -> str:
    """report.md: the same with sources and deviations, for an issue or a wiki."""
    lines = [f"# {comparison.name}", "", _total(comparison), "", table(COLUMNS, rows(comparison.outcomes)), ""]
    if comparison.overrides:
        lines += ["Overridden: " + ", ".join(f"`{override}`" for override in comparison.overrides), ""]
    for outcome in comparison.outcomes:
        lines += [
            f"## {outcome.name}: {outcome.verdict}",
            "",
            f"`{outcome.model}`" + (f", {outcome.description}" if outcome.description else ""),
        ]
        lines += ["", *[f"- {line}" for line in remarks(outcome)]]
        lines += [f"- Source: {outcome.source}"] if outcome.source else []
        lines += [f"- Deviation: {deviation}" for deviation in outcome.deviations]
        lines += [f"- Warning: {warning}" for warning in outcome.warnings]
        lines += [f"- Log: [{outcome.log}]({outcome.log})", ""]
    return "\n".join(lines)
