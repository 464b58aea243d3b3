"""Processes that begin with everything loaded: forked from one that has imported torch, transformers and the package.

A Python that imports these keeps a core busy for seconds before it does anything, and a test of several processes starts many.
What `torchrun` itself does is seen by the tests that call it.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("torch.distributed", "transformers", "marlin_tools.run.execute", "marlin_tools.report", "marlin_tools.cli.make")
_SERVER = multiprocessing.get_context("forkserver")


class Forked:
    """A script in a process of its own, from its start to its end."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        _SERVER.set_forkserver_preload([*LOADED])
        self._log = log
        self._process: BaseProcess = _SERVER.Process(target=_perform, args=(arguments, environment, str(log)), daemon=True)
        with pytest.MonkeyPatch.context() as patch:  # the process that is forked from takes these with it
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", str(ROOT))
            self._process.start()

    def ended(self, seconds: float) -> int:
        """Its exit status, once it has one; negative if it was killed."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it still runs after {seconds} s:\n{self.said}"
        return self._process.exitcode

    @property
    def said(self) -> str:
        """What it has written to stdout and stderr."""
        return self._log.read_text()

    def kill(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.join()


@contextmanager
def started(size: int, arguments: list[str], log: Path) -> Iterator[list[Forked]]:
    """So many processes that know of each other, as those of `torchrun`; what is left of them in the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    processes = [Forked(arguments, {**meeting, **each}, log.with_name(f"{log.name}.{rank}")) for rank, each in enumerate(own)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def _perform(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be `python script.py arguments` in this process."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
