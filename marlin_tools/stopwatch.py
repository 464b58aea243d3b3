"""Where the time goes: spans of work by name, for whoever asks.

    with Stopwatch() as watch:
        ...                         # code that runs `with span("factor"): ...`
    watch.seconds()                 # {"factor": 1.2, ...}

Without a stopwatch a span costs nothing. With one, work on a GPU is timed by events, so nothing waits for it. A span inside a
span is taken off the outer one. Work in a thread of its own is timed by `apart`: it goes on beside the rest.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

import torch

_current: ContextVar["Stopwatch | None"] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Collects spans while it is entered. Threads that run in a copy of the context report to it as well."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._intervals: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, torch.cuda.Event | float]] = []
        self._token: Token[Stopwatch | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._token is not None:
            _current.reset(self._token)

    def seconds(self) -> dict[str, float]:
        """What each name took in all."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._intervals:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._intervals.clear()
        return dict(self._seconds)

    def begin(self, name: str) -> None:
        """A span begins; the one that is open waits."""
        now = self._now()
        if self._open:
            self._close(now)
        self._open.append((name, now))

    def end(self) -> None:
        """The innermost span ends."""
        now = self._now()
        self._close(now)
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def add(self, name: str, seconds: float) -> None:
        """Time that passed elsewhere."""
        self._seconds[name] += seconds

    def _now(self) -> "torch.cuda.Event | float":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _close(self, now: "torch.cuda.Event | float") -> None:
        name, begin = self._open[-1]
        if isinstance(begin, float):
            assert isinstance(now, float), now
            self._seconds[name] += now - begin
        elif isinstance(now, torch.cuda.Event):
            self._intervals.append((name, begin, now))


@contextmanager
def span(name: str) -> Iterator[None]:
    """Work of this name, if somebody asks."""
    watch = _current.get()
    if watch is None:
        yield
        return
    watch.begin(name)
    try:
        yield
    finally:
        watch.end()


@contextmanager
def unwatched() -> Iterator[None]:
    """Spans cost nothing here: work that is recorded for later takes no time yet."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def apart(name: str) -> Iterator[None]:
    """The same for work in a thread of its own."""
    watch, begin = _current.get(), time.perf_counter()
    try:
        yield
    finally:
        if watch is not None:
            watch.add(name, time.perf_counter() - begin)
