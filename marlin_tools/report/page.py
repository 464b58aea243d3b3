"""Pages and cards from the templates beside this file. Whatever a template is given is escaped, unless it says otherwise.

HTML is escaped by Jinja2. In Markdown every value that is not already Markdown becomes one line of plain text, whatever names
people give to files, tasks and tensors.
"""

import re
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from marlin_tools import __version__
from marlin_tools.evaluation.scores import Score, digits, spell
from marlin_tools.report.text import table
from marlin_tools.verification.inspect import size

TIMES = ("<!-- times -->", "<!-- /times -->")
"""Between these stands what differs from run to run and from place to place; a comparison of two pages leaves it out."""

MINUS = "\N{MINUS SIGN}"
"""As long as a plus; a hyphen is not."""

_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, by length", "kl": "mean KL, nats", "top1": "same likeliest token"}
"""What some metrics are called by people."""


def page(template: str, **values: Any) -> str:
    """An HTML document, complete in itself."""
    text: str = _html().get_template(template).render(values)
    return text


def markdown(template: str, **values: Any) -> str:
    """A Markdown document."""
    text: str = _markdown().get_template(template).render(values)
    return text


@cache
def _html() -> Environment:
    filters = {"words": words, "number": number, "named": named, "cells": score_cells, "metric": metric_name}
    return _environment(filters | {"size": size, "duration": duration, "finite": isfinite}, autoescape=True)


@cache
def _markdown() -> Environment:
    filters = {"code": code, "words": marked, "table": _table, "asis": Markdown}
    return _environment(filters, autoescape=False, finalize=plain)  # `finalize` escapes, for Markdown


def _environment(filters: dict[str, Any], **how: Any) -> Environment:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    how |= {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    found = Environment(loader=loader, undefined=StrictUndefined, **how)  # noqa: S701 (each caller says how it escapes)
    found.filters |= filters
    found.globals |= {"version": __version__, "TIMES": [*map(Markup, TIMES)]}
    return found


# ---- HTML -------------------------------------------------------------------------------------------------------------


def words(text: str) -> Markup:
    """Plain text with `code` in it."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 (escaped on this line)


def named(name: str, small: object = None) -> Markup:
    """A name in the first column of a table, with a remark beside it."""
    beside = Markup("") if small is None else Markup(" <small>{}</small>").format(small)
    return Markup('<span><span class="name">{}</span>{}</span>').format(name, beside)


def number(value: float | None, stderr: float | None = None, sign: str = "") -> Markup:
    """A number with its standard error; empty if there is none."""
    if value is None:
        return Markup("")
    error = Markup("") if stderr is None else Markup(" <small>± {}</small>").format(digits(stderr))
    return Markup("<span>{}{}</span>").format(spell(value, sign=sign).replace("-", MINUS), error)


def metric_name(metric: str) -> str:
    """For people."""
    return _METRICS.get(metric, metric.replace("_", " "))


def score_cells(score: Score) -> list[str]:
    """A row of a table of scores: task, metric, value, original, difference, recovery."""
    return [
        named(score.task, score.details.get("on")),
        metric_name(score.metric),
        number(score.value, score.stderr),
        number(score.baseline, score.baseline_stderr),
        number(score.difference, score.difference_stderr, sign="+"),
        score.recovered,
    ]


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- Markdown ---------------------------------------------------------------------------------------------------------


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def plain(value: object) -> str:
    """One line that shows as it is: no markup, no HTML, no link, no list."""
    if isinstance(value, Markdown):
        return value
    line = " ".join(str(value).split())
    line = re.sub(r"[\\`*\[\]<>&~#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"^(\d*)([.)+=-])(?=[\s=-]|$)", r"\1\\\2", line)  # no list, no heading


def code(value: object) -> Markdown:
    """A name as code, whatever backticks are in it."""
    line = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}")


def marked(text: str) -> Markdown:
    """A sentence of ours with `code` in it."""
    parts = re.split(r"`([^`]+)`", text)
    return Markdown("".join(code(part) if index % 2 else _kept_apart(part) for index, part in enumerate(parts)))


def _kept_apart(text: str) -> str:
    """Plain text between two pieces of code keeps the spaces around it."""
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{' ' if before else ''}{plain(text)}{' ' if after and text.strip() else ''}"


def _table(rows: list[list[str]], columns: list[str]) -> Markdown:
    return Markdown(table(columns, [[marked(cell) for cell in row] for row in rows]))
