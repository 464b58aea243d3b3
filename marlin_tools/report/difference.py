"""What differs between results: sizes, scores, the loss of every linear, and the settings that made them.

Any model directories, two or more; the first is what the others are compared with.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_tools.errors import RecipeError
from marlin_tools.evaluation.scores import BESIDE_ANOTHER, Score, finite, spell
from marlin_tools.report.page import duration, page
from marlin_tools.report.result import Result, gather
from marlin_tools.report.text import table
from marlin_tools.resources import expanded, resolved
from marlin_tools.verification.inspect import size

TOLD = 10
"""Linears on the terminal: those whose losses differ most. The page and the JSON have all."""


_DECIDES = {"fingerprint": "text", "bos": "BOS", "task_version": "version"}
"""Details of a score that make it another one, and what they are called beside it; a fingerprint is shortened to `SHORT`."""

SHORT = 8

_MEASURED = ("backend", "activations", "computed_in")
"""How a model was computed with when it was measured: scores can be compared all the same, but one has to know."""


@dataclass(frozen=True)
class Difference:
    """Results by what they are called; every row of a table has one cell for each of them."""

    results: Mapping[str, Result]

    @property
    def names(self) -> list[str]:
        """What they are called."""
        return list(self.results)

    @property
    def labels(self) -> list[str]:
        """The same without the folders that all of them lie in."""
        parts = [Path(name).parts for name in self.names]
        shared = 0
        while all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
            shared += 1
        return [str(Path(*each[shared:])) for each in parts]

    @property
    def facts(self) -> list[tuple[str, list[str]]]:
        """What they are and what they take."""
        of = self._all
        rows = [
            ("model", [each.base for each in of]),
            ("format", [each.facts["format"] or each.facts["dtype"] for each in of]),
            ("method", [each.method for each in of]),
            ("size", [size(each.facts["bytes"]["total"]) for each in of]),
            ("bits per weight", [f"{each.bits:.2f}" if each.quantized else f"{each.bits:g}" for each in of]),
            ("sparsity", [_sparsity(each) for each in of]),
            ("made in", ["" if each.seconds is None else duration(each.seconds) for each in of]),
        ]
        return [row for row in rows if any(row[1])]

    @property
    def settings(self) -> list[tuple[str, list[str]]]:
        """What was set, read or used otherwise: only what is not the same for all that tell how they were made or measured."""
        made = [_made_with(each) if each.manifest else {} for each in self._all]
        return [*_unlike(made), *_unlike([_measured_with(each) for each in self._all])]

    @property
    def scores(self) -> list[tuple[Score, str, list[Score | None]]]:
        """Every score that one of them has, on what it was measured, and what each has of it.

        What was measured on another sample, of another text or by another version of a task is another score, and so is the
        distance to another original.
        """
        found = [{_identity(each, score): score for score in _scores(each)} for each in self._all]
        keys = list(dict.fromkeys(key for each in found for key in each))
        rows = [[each.get(key) for each in found] for key in keys]
        return [(next(filter(None, row)), _told_apart(key, keys), row) for key, row in zip(keys, rows, strict=True)]

    @property
    def of(self) -> str:
        """What of the linears was measured in all of them: "output", or "weight"; empty if nothing was."""
        for of in ("output", "weight"):
            if all(any(entry.get(f"{of}_error") is not None for entry in each.linears) for each in self._all if each.linears):
                return of
        return ""

    @property
    def linears(self) -> list[tuple[str, list[float | None]]]:
        """The loss of every linear in each; those that differ most come first, where none differs those that lost most."""
        key = f"{self.of}_error"
        found = [{e["name"]: float(e[key]) for e in each.linears if e.get(key) is not None} for each in self._all]
        rows = [(name, [each.get(name) for each in found]) for name in dict.fromkeys(name for each in found for name in each)]
        return sorted(rows, key=lambda row: (-_span(row[1]), -max(loss for loss in row[1] if loss is not None)))

    @property
    def _all(self) -> Sequence[Result]:
        return list(self.results.values())

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "models": self.names,
            "facts": dict(self.facts),
            "bytes": [each.facts["bytes"] for each in self._all],
            "settings": dict(self.settings),
            "scores": [
                {
                    "task": first.task,
                    "metric": first.metric,
                    "on": on,
                    "values": [None if each is None else finite(each.value) for each in row],
                }
                for first, on, row in self.scores
            ],
            "linears": dict(self.linears),
        }


def compare(directories: Sequence[Path]) -> Difference:
    """Read two or more model directories."""
    names = [str(path) for path in directories]
    if len({resolved(path) for path in directories}) < max(2, len(names)):
        raise RecipeError(
            f"two or more different directories can be compared, not {' and '.join(f'`{name}`' for name in names)}",
            hint="marlin-tools compare DIR DIR",
        )
    return Difference({name: gather(expanded(name), None, weights=False) for name in names})


def as_text(found: Difference) -> str:
    """Tables for the terminal."""
    parts = [table(("", *found.labels), [(what, *cells) for what, cells in found.facts])]
    if found.settings:
        parts.append(table(("setting", *found.labels), [(what, *cells) for what, cells in found.settings]))
    if found.scores:
        rows = [(first.task, first.metric, on, *_told(row)) for first, on, row in found.scores]
        parts.append(table(("task", "metric", "on", *found.labels), rows))
    if found.linears:
        losses = [(name, *("" if loss is None else f"{loss:.3%}" for loss in row)) for name, row in found.linears[:TOLD]]
        parts.append(table((f"linear: {found.of} lost", *found.labels), losses))
    return "\n\n".join(parts)


MARK = 'content="marlin-tools compare"'
"""What tells such a page."""


def as_page(found: Difference) -> str:
    """report.html."""
    results = dict(zip(found.labels, found.results.values(), strict=True))
    return page("difference.html.j2", found=found, points=points(results))


def points(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Mean KL beside bits and time: what quality costs. Of those that were measured alike, if some were not of the most."""
    distances = {
        name: {
            _identity(each, score): score.value
            for score in _scores(each)
            if score.metric == "kl" and math.isfinite(score.value)
        }
        for name, each in results.items()
    }
    counted = Counter(key for found in distances.values() for key in found).most_common(1)
    if not counted or counted[0][1] < 2:
        return []
    ((key, _),) = counted
    return [
        {"name": name, "kl": distances[name][key], "bits": each.bits, "seconds": each.seconds}
        for name, each in results.items()
        if key in distances[name]
    ]


def _scores(result: Result) -> Sequence[Score]:
    return result.evaluation.scores if result.evaluation else ()


def _identity(result: Result, score: Score) -> tuple[str, ...]:
    """What has to be the same for two numbers to be put side by side."""
    known = {key: str(score.details.get(key, "unknown")) for key in _DECIDES}
    known["fingerprint"] = known["fingerprint"][:SHORT]
    known["baseline"] = _baseline(result)[:SHORT] if score.metric in BESIDE_ANOTHER else ""
    return (score.task, score.metric, str(score.details.get("on", "")), *known.values())


def _baseline(result: Result) -> str:
    """Which model the scores stand beside."""
    found = result.evaluation.baseline if result.evaluation else None
    return str((found or {}).get("fingerprint", "unknown"))


def _told_apart(key: tuple[str, ...], keys: Sequence[tuple[str, ...]]) -> str:
    """On what a score was measured, with what tells it from others that would look the same."""
    alike = [other for other in keys if other[:3] == key[:3]]
    unlike = [place for place in range(3, len(key)) if len({other[place] for other in alike}) > 1]
    names = [*_DECIDES.values(), "baseline"]
    return ", ".join(filter(None, [key[2], *(f"{names[place - 3]} {key[place]}" for place in unlike)]))


def _told(row: Sequence[Score | None]) -> Iterator[str]:
    yield from ("" if score is None else spell(score.value, score.stderr) for score in row)


def _sparsity(result: Result) -> str:
    sparsity = result.facts["sparsity"]
    if not sparsity or not sparsity["sparse"]:
        return ""
    where = "" if sparsity["2:4"] else f" in {sparsity['sparse']} of {sparsity['read']} linears"
    return f"2:4{where}, {sparsity['zeros']:.0%} zeros"


def _span(losses: Sequence[float | None]) -> float:
    known = [loss for loss in losses if loss is not None]
    return max(known) - min(known) if len(known) > 1 else 0.0


def _made_with(result: Result) -> dict[str, Any]:
    """What decides a result."""
    own = {key: result.manifest.get(key) for key in ("stage", "settings", "solver", "device", "versions")}
    tokens = {key: value for key, value in (result.calibration or {}).items() if key != "notes"}
    tokens |= {key: str(value)[:16] for key, value in tokens.items() if key == "fingerprint"}
    return {**own, "calibration": tokens, "original": str(result.original.get("fingerprint", ""))[:16]}


def _measured_with(result: Result) -> dict[str, Any]:
    """How the scores came to be, besides the text."""
    how = result.evaluation.model if result.evaluation else {}
    told = {key: how.get(key) for key in _MEASURED}
    if result.evaluation and result.evaluation.baseline:
        told["baseline"] = f"{result.evaluation.baseline['origin']} ({_baseline(result)[:SHORT]})"
    return {"measured with": told} if how else {}


def _unlike(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What is not the same in all that say anything."""
    flat = [dict(_flat(each)) for each in values]
    told = [each for each in flat if each]
    keys = dict.fromkeys(key for each in told for key in each)
    return [(key, [each.get(key, "") for each in flat]) for key in keys if len({each.get(key, "") for each in told}) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`a.b` and what stands there."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
