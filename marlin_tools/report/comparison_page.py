"""report.html of `reproduce`: every number beside what was expected, then each recipe with its source and its deviations."""

from collections.abc import Iterator
from html import escape

from marlin_tools.report.charts import band
from marlin_tools.report.comparison import Comparison, Finding, Outcome, remarks
from marlin_tools.report.model_page import metric_name, number
from marlin_tools.report.page import details, facts, page, paragraphs, section, table, tiles, verdict, words

_NAMES = ("recipe and task", "metric", "measured", "published", "difference", "allowed", "verdict")


def comparison_page(comparison: Comparison) -> str:
    """The whole page."""
    parts = [tiles(_figures(comparison)), _numbers(comparison), *(_recipe(outcome) for outcome in comparison.outcomes)]
    if comparison.overrides:
        parts.insert(1, section("Overridden", paragraphs(f"`{override}`" for override in comparison.overrides)))
    lead = words("Each number beside the expected one. What was not run never passes; what has no tolerance is only reported.")
    return page(comparison.name, "Reproduction", lead, "\n".join(parts))


def _figures(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    total = len(comparison.outcomes)
    overall = {0: "PASS", 1: "FAIL", 2: "not run"}[comparison.code]
    if overall == "PASS" and not comparison.count("PASS"):
        overall = "reported"
    yield "In all", verdict(overall), f"{total} recipes, exit code {comparison.code}"
    yield "Passed", str(comparison.count("PASS")), "every judged number within its tolerance"
    yield "Failed", str(comparison.count("FAIL")), "a number outside, or a check that failed"
    yield "Not run", str(comparison.count("not run")), "a model, a dataset or a control is missing"
    yield "Reported", str(comparison.count("reported")), "nothing published to judge by"


def _numbers(comparison: Comparison) -> str:
    rows: list[tuple[str, ...]] = []
    for outcome in comparison.outcomes:
        name = f'<span class="name">{escape(outcome.name)}</span>'
        if not outcome.findings:
            rows.append((name, "", "", "", "", "", verdict(outcome.verdict)))
        rows += [_row(name, finding) for finding in outcome.findings]
    about = (
        "± is one standard error of the measured number. The shaded band is what is allowed, the mark is where the number lies."
    )
    return section("Measured and published", table(_NAMES, rows, "numbers judged"), about)


def _row(name: str, finding: Finding) -> tuple[str, ...]:
    allowed = ""
    if finding.tolerance is not None:
        picture = (
            "" if finding.difference is None else f'<span class="measure">{band(finding.difference, finding.tolerance)}</span>'
        )
        allowed = f'<span class="allowance">{picture}±{finding.tolerance:g}</span>'
    return (
        f"<span>{name} <small>{escape(finding.task)}</small></span>",
        escape(metric_name(finding.metric)),
        number(finding.measured, finding.stderr),
        number(finding.expected),
        number(finding.difference, sign="+"),
        allowed,
        verdict(finding.verdict),
    )


def _recipe(outcome: Outcome) -> str:
    """Everything about one recipe but its judged numbers."""
    known = [
        ("model", f"`{outcome.model}`"),
        ("what", outcome.description),
        ("control", f"`{outcome.control}`" if outcome.control else ""),
    ]
    known += [("numbers from", outcome.source), ("result", ", ".join(f"`{path}`" for path in outcome.outputs))]
    parts = [facts((what, value) for what, value in known if value)]
    parts += [f"<h3>{title}</h3>{paragraphs(lines)}" for title, lines in _lists(outcome) if lines]
    if outcome.evaluation is not None:
        names = ("task", "metric", "measured", "original", "difference")
        scores = [
            (
                f'<span class="name">{escape(score.task)}</span>',
                escape(metric_name(score.metric)),
                number(score.value, score.stderr),
                number(score.baseline, score.baseline_stderr),
                number(score.difference, score.difference_stderr, sign="+"),
            )
            for score in outcome.evaluation.scores
        ]
        parts.append(details("All that was measured", table(names, scores, "numbers")))
    parts.append(f'<p class="log"><a href="{escape(outcome.log, quote=True)}">Log of the run</a></p>')
    return section(outcome.name, "\n".join(parts), mark=verdict(outcome.verdict))


def _lists(outcome: Outcome) -> Iterator[tuple[str, list[str]]]:
    yield "Remarks", remarks(outcome)
    yield "Deviations from the source", list(outcome.deviations)
    yield "Warnings", list(outcome.warnings)
