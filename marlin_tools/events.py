"""What a running stage tells the outside: plain values, pushed through one function.

A stage never prints. It calls `emit(Event(...))`; the command line draws bars from the events, tests collect them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["stage", "progress", "note", "warning", "hint", "result"]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    stage     a stage begins; `text` is its name
    progress  `done` of `total` units of `text` are finished; `data` may hold the loss or the layer
    note      a fact worth a line (what an alias resolved to, what was reused)
    warning   something the user should know before trusting the result; also kept for the manifest
    hint      what one might do next
    result    a stage ended; `data` is its outcome
    """

    kind: Kind
    text: str
    done: int = 0
    total: int = 0
    data: dict[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


def silent(_event: Event) -> None:
    """The default `emit`: nobody listens."""
