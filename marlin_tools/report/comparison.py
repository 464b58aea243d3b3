"""What `reproduce` found, for people: a table for the terminal, report.md for an issue or a wiki, report.html to look at."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.output import put
from marlin_tools.errors import MarlinToolsError
from marlin_tools.evaluation.scores import spell
from marlin_tools.report.difference import points
from marlin_tools.report.page import markdown, page
from marlin_tools.report.result import gather
from marlin_tools.report.text import table
from marlin_tools.run.verdict import Comparison, Finding, Outcome, Verdict

COLUMNS = ("recipe", "task", "metric", "measured", "published", "difference", "allowed", "verdict")


def write_comparison(comparison: Comparison) -> Path:
    """Write report.md, report.html and report.json beside the logs; returns the page."""
    results = {}
    for outcome in comparison.outcomes:
        for made in filter(Path.is_dir, map(Path, outcome.outputs[-1:])):
            with suppress(MarlinToolsError):  # a damaged result is told of elsewhere
                results[outcome.name] = gather(made, None, outcome.evaluation, weights=False)
    values: dict[str, Any] = {"comparison": comparison, "remarks": remarks, "points": points(results)}
    put(comparison.home / "report.md", as_markdown(comparison))
    put(comparison.home / "report.json", json.dumps(comparison.describe(), indent=1, allow_nan=False) + "\n")
    put(comparison.home / "report.html", page("reproduction.html.j2", **values))
    return comparison.home / "report.html"


def as_text(comparison: Comparison) -> str:
    """For the terminal: the table, then what is wrong."""
    wrong = [outcome for outcome in comparison.outcomes if outcome.verdict in {"FAIL", "not run"}]
    told = "\n".join(f"{outcome.name}: {line}" for outcome in wrong for line in remarks(outcome))
    return "\n\n".join(filter(None, [table(COLUMNS, rows(comparison.outcomes)), told, total(comparison)]))


def as_markdown(comparison: Comparison) -> str:
    """The same with sources and deviations."""
    values = {"columns": COLUMNS, "rows": rows(comparison.outcomes), "total": total(comparison), "remarks": remarks}
    return markdown("reproduction.md.j2", comparison=comparison, **values)


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A line for each finding, in the order of `COLUMNS`."""
    lines = []
    for outcome in outcomes:
        lines += [[outcome.name, each.task, each.metric, *_numbers(each), each.verdict] for each in outcome.findings]
        lines += [] if outcome.findings else [[outcome.name, *[""] * 6, outcome.verdict]]
    return lines


def _numbers(finding: Finding) -> list[str]:
    return [
        "" if finding.measured is None else spell(finding.measured, finding.stderr),
        "" if finding.expected is None else spell(finding.expected),
        "" if finding.difference is None else spell(finding.difference, sign="+"),
        "" if finding.tolerance is None else f"±{finding.tolerance:g}",
    ]


def remarks(outcome: Outcome) -> list[str]:
    """What has to be said about an outcome besides its numbers."""
    lines = [f"{'FAIL' if outcome.failed else 'not run'}: {outcome.problem}"] if outcome.problem else []
    lines += [f"`{each.task}` was not run: {each.reason}" for each in outcome.findings if each.reason and not outcome.problem]
    lines += [
        f"FAIL: `{each.task}` {each.metric} is {spell(each.difference, sign='+')} from {each.expected:g}, "
        f"±{each.tolerance:g} allowed"
        for each in outcome.findings
        if each.verdict == "FAIL" and each.difference is not None
    ]
    return lines + [f"`{each.task}`: {each.note}" for each in outcome.findings if each.note]


def total(comparison: Comparison) -> str:
    """How many recipes have which verdict."""
    verdicts: tuple[Verdict, ...] = ("PASS", "FAIL", "reported", "not run")
    return ", ".join(f"{comparison.count(each)} {each}" for each in verdicts if comparison.count(each))
