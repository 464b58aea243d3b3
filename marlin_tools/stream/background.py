"""One thread that works behind the main one, at most one task behind.

A task that fails makes the next call on the main thread fail with the same exception, so nothing that depends on it is begun. A
task that has been handed over is finished even if the main thread is interrupted.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Any, Self


class Background:
    """Tasks run in the order in which they are handed over."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._last: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def hand_over(self, task: Callable[[], None]) -> None:
        """Begin a task as soon as the one before it is done, and wait for that."""
        self.wait()
        self._last = self._thread.submit(copy_context().run, task)

    def wait(self) -> None:
        """Wait for the last task; raises what it raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
