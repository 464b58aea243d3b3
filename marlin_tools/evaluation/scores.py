"""What an evaluation found: one `Score` per task and metric and, beside a baseline, what is left of the original."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

FIRM = {"items": 100, "tokens": 1000}
"""So many answered items, or tokens of a text, make a score that may be summed up in one number."""

BESIDE_ANOTHER = ("kl", "top1")
"""Metrics that compare a model with its baseline."""

OF_TEXTS = ("perplexity", *BESIDE_ANOTHER)
"""All that is measured on a text; what a task of questions has, lm-eval knows."""

PLAIN = 1e9
"""Numbers from here on are written with a power of ten: a ruined model has some with hundreds of digits."""

COLUMNS = ("task", "metric", "on", "model", "baseline", "difference", "recovery")


@dataclass(frozen=True)
class Score:
    """One number.

    task               as the user named it, or a part of it
    metric             perplexity, kl (nats per token), top1 (share of positions), acc, ...
    value, stderr      and its standard error, None where there is none
    higher_is_better   None if unknown
    baseline, ...      the same number for the original model
    difference         value - baseline, with a standard error from paired items
    part_of            the group that it is summed up in
    details            how it was measured: number of items, shots, BOS, window length, version; `on` says it in a few words
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    part_of: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def against(self, baseline: float, stderr: float | None, difference_stderr: float | None) -> "Score":
        """The same score beside the original model's."""
        beside = replace(self, baseline=baseline, baseline_stderr=stderr)
        return replace(beside, difference=self.value - baseline, difference_stderr=difference_stderr)

    @property
    def recovery(self) -> float | None:
        """What is left of the original, in percent: value / baseline, or the inverse where lower is better.

        Nothing is left where the value is not finite; None where there is nothing to compare it with.
        """
        if self.baseline is None or self.higher_is_better is None or not math.isfinite(self.baseline):
            return None
        if not math.isfinite(self.value):
            return 0.0
        top, bottom = (self.value, self.baseline) if self.higher_is_better else (self.baseline, self.value)
        return 100 * top / bottom if bottom else None

    @property
    def recovery_stderr(self) -> float | None:
        """Its standard error, to first order: the error of the difference over what one difference is."""
        if self.recovery is None or self.difference_stderr is None or not self.baseline or not math.isfinite(self.value):
            return None
        share = self.difference_stderr / abs(self.baseline if self.higher_is_better else self.value)
        return 100 * share * (1 if self.higher_is_better else abs(self.baseline / self.value))

    @property
    def recovered(self) -> str:
        """The same for people; empty where it is not known."""
        return "" if self.recovery is None else f"{digits(self.recovery, 1)} %"

    @property
    def firm(self) -> bool:
        """Whether enough was asked for a headline: a few items are all right or all wrong by chance."""
        return any((self.details.get(what) or 0) >= least for what, least in FIRM.items())

    @property
    def increase(self) -> float | None:
        """How much larger than the baseline, in percent."""
        return 100 * (self.value / self.baseline - 1) if self.baseline else None

    def describe(self) -> dict[str, Any]:
        """What a JSON report records; a number that is not finite becomes null."""
        fields = {**asdict(self), "recovery": self.recovery, "increase": self.increase}
        return {key: finite(value) for key, value in fields.items()}

    def row(self) -> list[str]:
        """One line for people, in the order of `COLUMNS`."""
        difference = "" if self.difference is None else spell(self.difference, self.difference_stderr, sign="+")
        baseline = "" if self.baseline is None else spell(self.baseline, self.baseline_stderr)
        on = str(self.details.get("on", ""))
        return [self.task, self.metric, on, spell(self.value, self.stderr), baseline, difference, self.recovered]


@dataclass(frozen=True)
class Evaluation:
    """All scores of a model, and everything that is needed to get them again.

    model, baseline   origin, fingerprint, format, dtype; backend, device, dtype and activations that it was computed with
    settings          what was asked for
    versions          of everything that computed
    notes             facts and warnings that belong beside the numbers
    seconds           how long it took, None if it was taken over; no part of the result
    """

    scores: tuple[Score, ...]
    model: Mapping[str, Any]
    baseline: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float | None

    @classmethod
    def restore(cls, content: Mapping[str, Any]) -> "Evaluation":
        """An evaluation from what `describe` wrote."""
        names = [each.name for each in fields(Score)]
        found = [{name: score[name] for name in names} for score in content["scores"]]
        scores = tuple(Score(**{**each, "value": math.nan if each["value"] is None else each["value"]}) for each in found)
        kept = {name: content[name] for name in ("model", "baseline", "settings", "versions")}
        return cls(scores=scores, notes=tuple(content["notes"]), seconds=None, **kept)

    def score(self, task: str, metric: str | None = None) -> Score:
        """The score of a task, its first one unless a metric is named."""
        for score in self.scores:
            if score.task == task and metric in (None, score.metric):
                return score
        raise KeyError(f"no score of `{task}`" + (f" with metric `{metric}`" if metric else ""))

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "model": dict(self.model),
            "baseline": None if self.baseline is None else dict(self.baseline),
            "scores": [score.describe() for score in self.scores],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "times": {} if self.seconds is None else {"seconds": round(self.seconds, 2)},
        }

    def table(self, *, parts: bool = False) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) for people; the parts of a group only if asked for."""
        shown = [score for score in self.scores if parts or score.part_of is None]
        rows = [score.row() for score in shown]
        width = len(COLUMNS) if self.baseline is not None else COLUMNS.index("baseline")
        return list(COLUMNS[:width]), [row[:width] for row in rows]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; one value has none. What is beyond a float is infinite, or no number."""
    count = len(values)
    mean = _total(values) / count
    spread = _total([(value - mean) * (value - mean) for value in values])  # a square by `**` raises where it is too large
    return mean, math.sqrt(spread / (count - 1) / count) if count > 1 else None


def _total(values: Sequence[float]) -> float:
    """Exact, as far as a float holds it."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def exponential(value: float) -> float:
    """Of `value`; infinity if that is too large for a float: a ruined model has such losses."""
    return math.exp(value) if value < 700 else math.inf


def finite(value: object) -> object:
    """As JSON can hold it: null for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spell(value: float, stderr: float | None = None, sign: str = "") -> str:
    """Four digits after the point, with the standard error; what these digits show as zero has no sign."""
    number = digits(value, sign=sign)
    number = number if number.strip("+-0.") else number.lstrip("+-")
    return number if stderr is None else f"{number} ± {digits(stderr)}"


def digits(value: float, count: int = 4, sign: str = "") -> str:
    """So many digits after the point; of a number that is too long to be read, before a power of ten."""
    return f"{value:{sign}.{count}{'f' if abs(value) < PLAIN or not math.isfinite(value) else 'e'}}"
