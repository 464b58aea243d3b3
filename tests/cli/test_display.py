"""How events, errors and tables look."""

import io
import sys
import threading

import pytest

from marlin_tools import report
from marlin_tools.cli import ui
from marlin_tools.errors import RecipeError
from marlin_tools.events import Event

EVENTS = [
    Event("stage", "quantize"),
    Event("note", "`[bold]x[/bold]` is :smile: 12"),
    *(Event("progress", "blocks", done, 40) for done in range(1, 41)),
    Event("progress", "model.layers.0.q_proj"),
    Event("warning", "damping was raised"),
    Event("hint", "look"),
    Event("result", "done"),
]
LINES = """\
quantize
  `[bold]x[/bold]` is :smile: 12
  blocks 10/40
  blocks 20/40
  blocks 30/40
  blocks 40/40
warning: damping was raised
hint: look
  done
"""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def _show(monkeypatch, stream, **environment):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    with ui.Display() as display:
        for event in EVENTS:
            display(event)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    assert LINES == _show(monkeypatch, io.StringIO())


def test_bars_and_colors_on_a_terminal(monkeypatch):
    shown = _show(monkeypatch, Terminal())

    assert "\x1b[33mwarning:" in shown
    assert "━" in shown
    assert "blocks 10/40" not in shown


def test_nobody_but_the_run_draws(monkeypatch):
    """A second thread could put an old bar under a newer line."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = threading.active_count()
    with ui.Display() as display:
        display(EVENTS[2])
        assert before == threading.active_count()


def test_what_has_no_count_yet_is_seen_until_there_is_one(monkeypatch):
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with ui.Display() as display:
        display(Event("progress", "logits"))
        at = stream.tell()
        display(Event("progress", "blocks", 4, 4))
    said = stream.getvalue()

    assert "logits" in said[:at]
    assert "logits" not in said[at:]
    assert "4/4" in said[at:]


def test_bars_are_gone_after_their_stage(monkeypatch):
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with ui.Display() as display:
        display(Event("progress", "blocks", 3, 4))
        display(Event("stage", "verify"))
        at = stream.tell()
        display(Event("note", "x"))
        display(Event("progress", "shards", 1, 4))
    said = stream.getvalue()

    assert "3/4" in said[:at]
    assert "3/4" not in said[at:]
    assert "1/4" in said[at:]


def test_no_colors_if_not_wanted(monkeypatch):
    shown = _show(monkeypatch, Terminal(), NO_COLOR="1")

    assert "warning: damping" in shown
    assert "\x1b[33m" not in shown
    assert "\x1b[36m" not in shown


def test_every_line_of_an_error_is_labeled(capsys):
    ui.complain(RecipeError.of(["a", "b [red]"], hint="c"))

    assert ("", "error: a\nerror: b [red]\nhint: c\n") == tuple(capsys.readouterr())


@pytest.mark.parametrize(
    ("columns", "rows", "expected"),
    (
        (
            ("a", "number"),
            [("x", "1.5"), ("yyyyy", "+22")],
            "| a     | number |\n| ----- | -----: |\n| x     |    1.5 |\n| yyyyy |    +22 |",
        ),
        (("a", "b"), [("x|y", ""), ("", "z")], "| a    | b   |\n| ---- | --- |\n| x\\|y |     |\n|      | z   |"),
        (("a", "b"), [], "| a   | b   |\n| --- | --- |"),
    ),
)
def test_table(columns, rows, expected):
    assert expected == report.table(columns, rows)


def test_facts_are_aligned():
    assert "  a    1\n  bcd  2" == report.facts([("a", "1"), ("bcd", "2")])
