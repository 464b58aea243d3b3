"""The frame of every page, and the few things that it is made of: sections, tables, key figures, lists of facts."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from marlin_tools import __version__

TIMES = ("<!-- times -->", "<!-- /times -->")
"""Between these stands what differs from run to run; a comparison of two pages leaves it out."""


def page(title: str, over: str, lead: str, body: str) -> str:
    """A whole document; `over` stands small above the title, `lead` below it."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="over">{escape(over)}</p>\n<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>\n</header>\n'
        f"{body}\n<footer>marlin-tools {__version__}. This page is one file and loads nothing.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def words(text: str) -> str:
    """Plain text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def section(title: str, content: str, about: str = "", mark: str = "") -> str:
    """A part of a page; `about` says under the heading how to read it, `mark` stands beside the heading."""
    told = f'<p class="about">{words(about)}</p>\n' if about else ""
    return f"<section>\n<h2>{escape(title)}{mark}</h2>\n{told}{content}\n</section>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: (what, value, remark); a value may begin with a verdict."""
    cells = (
        f'<div class="tile"><p class="what">{escape(what)}</p>'
        f'<p class="value">{value}</p><p class="remark">{words(remark)}</p></div>'
        for what, value, remark in figures
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; on a narrow screen each row becomes a card, labelled with the column names."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(column, quote=True)}"{"" if cell else " class=empty"}>{cell}</td>'
            for column, cell in zip(columns, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """What and how much, as a list of definitions."""
    return "<dl>" + "".join(f"<dt>{escape(what)}</dt><dd>{words(value)}</dd>" for what, value in rows) + "</dl>"


def details(title: str, content: str) -> str:
    """Something that few will look at."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def code(text: str) -> str:
    """Commands, or a file."""
    return f"<pre><code>{escape(text.rstrip(), quote=False)}</code></pre>"


def verdict(word: str) -> str:
    """A verdict with its sign, so that colour is not all that tells it."""
    signs = {"PASS": "✓", "FAIL": "✗", "ok": "✓", "FAILED": "✗"}
    kind = {"PASS": "good", "ok": "good", "FAIL": "bad", "FAILED": "bad"}.get(word, "idle")
    return f'<span class="verdict {kind}">{signs.get(word, "–")} {escape(word)}</span>'


def paragraphs(lines: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{words(line)}</li>" for line in lines) + "</ul>"
