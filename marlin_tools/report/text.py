"""Results for the terminal: plain rows, and aligned Markdown tables, which read the same there and on a page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlin_tools.run.execute import RunResult
from marlin_tools.verification.verify import Verification


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns that hold numbers are aligned to the right."""
    cells = [list(columns), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    # what begins like a number
    right = [any(column[1:]) and all(c[0] in "+-.0123456789" for c in column[1:] if c) for column in zip(*cells, strict=True)]
    ruler = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return "\n".join(_line(row, widths, right) for row in (cells[0], ruler, *cells[1:]))


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """What and how much, one per line, indented."""
    lines = list(rows)
    width = max((len(what) for what, _ in lines), default=0)
    return "\n".join(f"  {what:<{width}}  {value}".rstrip() for what, value in lines)


def diagnosis(findings: Iterable[Mapping[str, str]]) -> str:
    """What `doctor` found, with what to do beneath what is not as it should be."""
    marks = {"ok": " ", "note": "-", "problem": "!"}
    lines = []
    for each in findings:
        lines.append(f"{marks[each['status']]} {each['name']:<20}{each['value']}")
        lines += [f"  {'':<20}{each['hint']}"] if each["hint"] else []
    return "\n".join(lines)


def plan(steps: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """What a run would do, stage by stage."""
    lines = list(notes)
    for step in steps:
        target = f" -> {', '.join(step['outputs'])}" if step["outputs"] else ""
        lines += [f"{step['stage']} {step['model']}{target}", facts(step["facts"].items())]
    return "\n".join(lines)


def summary(run: RunResult) -> str:
    """What a run has led to: the text it wrote, the scores, the checks, and the directories that it made."""
    parts = [run.text] if run.text is not None else []
    if run.evaluation is not None:
        parts.append(table(*run.evaluation.table()))
    if run.outputs and run.verifications:
        rows = [_verdict(path, run.verifications[path]) for path in run.outputs if path in run.verifications]
        parts.append(table(("model", "checks", "loads in"), rows))
    elif run.outputs:
        parts.append("\n".join(map(str, run.outputs)))
    parts += [f"{path}\n{_checks(each)}" for path, each in run.verifications.items() if not (run.outputs and each.ok)]
    return "\n\n".join(parts)


def _verdict(path: Path, verification: Verification) -> tuple[str, str, str]:
    """One line about a directory that a run has made."""
    loads = ", ".join(f"{each.engine} {each.version}" for each in verification.engines if each.loads)
    return str(path), verification.counted if verification.ok else "FAILED", loads


def _checks(verification: Verification) -> str:
    """What was looked at, then which engine will load it."""
    rows = [(check.name, check.result, check.detail) for check in verification.checks]
    rows += [(f"{each.engine} {each.version}", "loads" if each.loads else "no", str(each)) for each in verification.engines]
    return table(("check", "result", "detail"), rows)


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = [cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, right, strict=True)]
    return f"| {' | '.join(cells)} |"
