"""What people see: events as lines and bars on stderr, errors with their hint, results on stdout. The only importer of rich.

Bars appear on a terminal only; elsewhere a long count is reported at every quarter of it. rich itself honours `NO_COLOR`.
Results are written as they are, without colour or wrapping, so that what a script reads is what a person sees.
"""

import io
import os
import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from marlin_tools.errors import MarlinToolsError, OutputError, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from marlin_tools.events import Event

_STYLES = {"error": "bold red", "warning": "yellow", "hint": "cyan"}


_LINE = 2000
"""Characters of one line on stderr."""

_BAR = 20
"""Columns of a bar."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What would steer a terminal, or cannot be written as UTF-8."""


def write(text: str) -> None:
    """A result, as it is but for control characters."""
    if sys.stdout is None:
        raise OutputError("the result cannot be written to stdout: it is closed")
    text = _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text.rstrip("\n"))
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        forget()
    except OSError as error:
        forget()
        raise OutputError(f"the result cannot be written to stdout: {error.strerror}") from error


def forget() -> None:
    """Let go of what could not be written to stdout, which would fail again at the end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(document: Any) -> None:
    """A result as the one JSON document on stdout."""
    import json

    write(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def show(document: Any, text: str, *, as_json: bool) -> int:
    """A result in one of its two forms; 0, the exit code of what was done."""
    write_json(document) if as_json else write(text)
    return 0


def note(text: str) -> None:
    """A fact worth a line, on stderr."""
    _stderr().print(plain(text, _LINE))


def hint(text: str) -> None:
    """What one might do next, on stderr."""
    _labeled(_stderr(), "hint", text)


def complain(error: MarlinToolsError) -> None:
    """`error:` for every line of the message, then `hint:`."""
    console = _stderr()
    for line in error.lines:
        _labeled(console, "error", line)
    if error.hint:
        _labeled(console, "hint", error.hint)


def _stderr() -> "Console":
    from rich.console import Console

    # The stream of now: a library that is kept quiet has sys.stderr taken away for a while, our bars stay.
    return Console(file=cast("TextIO", _Heard(sys.stderr)), highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Heard(io.TextIOBase):
    """A stream for as long as it can be written: when nobody reads on, or its disk is full, the work goes on without words."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # (typeshed has a plain attribute)
        """Whether letters beyond ASCII can be written follows from it."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """By which the width of a terminal is asked for."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or nothing from now on."""
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Write what is left, or nothing from now on."""
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def open_stderr() -> None:
    """Of a process that was started without one: nothing is told, and no file that is opened later is taken for it."""
    while sys.stderr is None:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor >= 2:  # that of stderr is 2; below it are closed ones as well
            sys.stderr = os.fdopen(descriptor, "w", encoding="utf-8")


def _labeled(console: "Console", label: str, text: str) -> None:
    from rich.text import Text

    console.print(Text.assemble((f"{label}:", _STYLES[label]), f" {text}"))


class Display:
    """Takes the events of a run; a context, so that its bars are gone when the result is written."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = _stderr()
        self._live = sys.stderr.isatty()
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        # Drawn here alone: a thread that draws by itself may write an old picture after our newer line.
        self._bars = Progress(*columns, console=self._console, transient=True, auto_refresh=False, disable=not self._live)
        self._drawn = 0.0
        self._tasks: dict[str, TaskID] = {}
        self._quarters: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: "Event") -> None:
        """Show one event."""
        if event.kind == "progress":
            self._advance(event)
        elif event.kind in _STYLES:
            _labeled(self._console, event.kind, plain(event.text, _LINE))
        elif event.kind == "stage":
            self._clear()
            self._console.print(plain(event.text, _LINE), style="bold")
        else:
            self._console.print(f"  {plain(event.text, _LINE)}")

    def _advance(self, event: "Event") -> None:
        if not event.total:  # what is being worked on, within the count that runs, or before there is one
            if self._live and not self._tasks:
                self._tasks[""] = self._bars.add_task("", total=None, detail="")
            for name, task in list(self._tasks.items())[-1:]:
                detail = self._fitted(event.text, name)
                self._bars.update(task, detail=detail, completed=None if name else event.done)
            self._draw(now="" in self._tasks)
        elif self._live:
            if event.text not in self._tasks:
                if "" in self._tasks:
                    self._bars.remove_task(self._tasks.pop(""))
                self._tasks[event.text] = self._bars.add_task(plain(event.text, _LINE), total=event.total, detail="")
            self._bars.update(self._tasks[event.text], completed=event.done, total=event.total)
            self._draw(now=event.done == event.total)
        else:
            quarter = 4 * event.done // event.total
            if quarter > self._quarters.get(event.text, 0):
                self._console.print(f"  {event.text} {event.done}/{event.total}")
            self._quarters[event.text] = quarter

    def _fitted(self, detail: str, name: str) -> str:
        """The end of a text, as long as there is room for it beside bar, count and time."""
        room = self._console.width - len(name) - _BAR - len("   999/999 0:00:00  ")
        text = plain(detail, _LINE)
        return text if len(text) <= room else f"…{text[1 - room :]}" if room > 8 else ""

    def _draw(self, *, now: bool = False) -> None:
        """Show how far it is, but no more than ten times a second."""
        if now or time.monotonic() - self._drawn > 0.1:
            self._bars.refresh()
            self._drawn = time.monotonic()

    def _clear(self) -> None:
        """A new stage counts anew."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._draw(now=True)
        self._tasks, self._quarters = {}, {}
