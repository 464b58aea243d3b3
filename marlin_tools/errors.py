"""Every failure that a user can cause, as one line that says what is wrong and one that says what to do.

Rules: a user's mistake raises a `MarlinToolsError`; misuse of the Python API raises `ValueError` or `TypeError`;
a broken invariant is an `assert` with the values. The command line catches `MarlinToolsError` once, at the top.
"""


class MarlinToolsError(Exception):
    """Base of all errors shown to users: `message` names the object, the value and the rule, `hint` the next step."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class RecipeError(MarlinToolsError):
    """A recipe or an option cannot be understood."""


class DataError(MarlinToolsError):
    """Calibration or evaluation text is missing, too short or unreadable."""


class ModelError(MarlinToolsError):
    """A model cannot be found, read or compressed."""


class FormatError(MarlinToolsError):
    """A weight format cannot hold these weights, or a checkpoint does not follow its format."""


class NumericalError(MarlinToolsError):
    """A layer has no finite solution; names the layer."""


class OutputError(MarlinToolsError):
    """A result cannot be written: occupied, locked, read-only or full."""


class DeviceError(MarlinToolsError):
    """The device asked for is not there, too small, or cannot run this."""
