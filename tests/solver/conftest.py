"""Kernels without a GPU: their own text, compiled for this machine, in the place of every launch."""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from marlin_tools.ops.solver import kernels as solver
from marlin_tools.resources import kernels_dir


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[solver.Routine], Any]:
    """A routine as a function of (argument, blocks, threads)."""
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder = tmp_path_factory.mktemp("host")

    @cache
    def compile_routine(routine: solver.Routine) -> Any:
        text = folder / f"{routine.name}.cpp"
        text.write_text(
            f'#include "{Path(__file__).with_name("host.cpp")}"\n#include "solver/{routine.file}"\n'
            'extern "C" void run(const void* argument, int blocks, int threads) '
            f"{{ host::run(&{routine.expression}, argument, blocks, threads); }}\n"
        )
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{kernels_dir()}"]
        subprocess.run(["g++", *options, "-o", text.with_suffix(".so"), text], check=True)
        return ctypes.CDLL(str(text.with_suffix(".so"))).run

    return compile_routine


@pytest.fixture
def on_host(compiled: Callable[[solver.Routine], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that asks for kernels gets them, on the CPU; the names of what was launched."""
    launched = []

    def launch(routine: solver.Routine, blocks: int, on: Tensor, *values: float) -> None:
        launched.append(routine.name)
        compiled(routine)(struct.pack(routine.layout, *values), blocks, routine.threads)

    monkeypatch.setattr(solver, "_launch", launch)
    monkeypatch.setattr(solver, "runs_on", lambda tensor: True)
    return launched
