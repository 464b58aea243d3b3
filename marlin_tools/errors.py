"""Every failure that a user can cause, as one line that says what is wrong and one that says what to do.

Rules: a user's mistake raises a `MarlinToolsError`; misuse of the Python API raises `ValueError` or `TypeError`;
a broken invariant is an `assert` with the values. The command line catches `MarlinToolsError` once, at the top.

Names come from files that anybody may have made, so a message is made plain when it is raised: one line, printable, bounded.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from types import TracebackType

LONGEST = 500
"""Characters of a message; a longer one loses its middle."""

MOST = 20
"""Problems that are listed one by one."""


def plain(text: str, limit: int = LONGEST) -> str:
    """`text` as one printable line of bounded length: control characters and lone surrogates are escaped."""
    if len(text) > limit:
        head = 2 * limit // 3
        text = f"{text[:head]} ... {text[len(text) - (limit - head - 5) :]}"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        if len(text) > limit:
            text = text[: limit - 4] + " ..."
    return text


def near(word: str, known: Iterable[str], rest: str | None = None) -> str:
    """A hint: `did you mean ...?` if something is near, and `rest`, by default what there is."""
    known = list(known)
    close = get_close_matches(word, known, n=1)
    return (f"did you mean `{close[0]}`? " if close else "") + (f"known: {', '.join(known)}" if rest is None else rest)


def counted(number: int, what: str) -> str:
    """`1 window`, `2 windows`."""
    return f"{number} {what}{'s' * (number != 1)}"


def first_line(failure: BaseException) -> str:
    """What another library says went wrong, or at least what kind of failure it is."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # what is wrong follows
        return " ".join(lines[:2])
    return lines[0] if lines and lines != ["None"] else type(failure).__name__


class MarlinToolsError(Exception):
    """Base of all errors shown to users: `message` names the object, the value and the rule, `hint` the next step."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.lines: tuple[str, ...] = (plain(message),)
        self.hint = None if hint is None else plain(hint)
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """What is wrong; one line, unless several problems were found at once."""
        return "\n".join(self.lines)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class RecipeError(MarlinToolsError):
    """A recipe or an option cannot be understood."""

    @classmethod
    def of(cls, problems: Sequence[str], *, hint: str | None = None) -> "RecipeError":
        """Several problems, a line each; of very many, the first ones and how many there are."""
        error = cls(problems[0], hint=hint)
        more = len(problems) - MOST
        error.lines = (*map(plain, problems[:MOST]), *([f"and {more} more problems"] if more > 0 else ()))
        return error


class DataError(MarlinToolsError):
    """Calibration or evaluation text is missing, too short or unreadable."""


class ModelError(MarlinToolsError):
    """A model cannot be found, read or compressed."""


def check_named(model: str) -> None:
    """Refuse a model without a name, as where a variable is not set; as a path it is the working directory."""
    if not model.strip():
        raise ModelError("no model is named", hint="a directory, a hub id (owner/name), or an alias such as demo")


class FormatError(MarlinToolsError):
    """A weight format cannot hold these weights, or a checkpoint does not follow its format."""


class NumericalError(MarlinToolsError):
    """A layer has no finite solution; names the layer."""


class OutputError(MarlinToolsError):
    """A result cannot be written: occupied, locked, read-only or full."""


class DeviceError(MarlinToolsError):
    """The device asked for is not there, too small, or cannot run this."""


class ErrorTranslation(AbstractContextManager["ErrorTranslation"]):
    """`with ErrorTranslation(ModelError, message, hint)`: whatever a library raises over a user's file becomes ours.

    For a single call of a library that reads foreign files and raises any class, panics of its Rust parts included. Our own
    errors, exits and interruptions pass through.
    """

    def __init__(self, kind: type[MarlinToolsError], what: str, hint: str) -> None:
        self.kind, self.what, self.hint = kind, what, hint

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if value is None or isinstance(value, MarlinToolsError | MemoryError):
            return
        if isinstance(value, Exception) or type(value).__module__ == "pyo3_runtime":
            raise self.kind(f"{self.what}: {first_line(value)}", hint=self.hint) from value
