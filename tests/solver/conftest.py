"""Kernels without a GPU: their own text, compiled for this machine, in the place of every launch."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.resources import kernels_dir


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kernel], Any]:
    """A kernel as a function of (argument, blocks, threads)."""
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder = tmp_path_factory.mktemp("host")

    @cache
    def compile_kernel(kernel: Kernel) -> Any:
        text = folder / f"{kernel.name}.cpp"
        text.write_text(
            f'#include "{Path(__file__).with_name("host.cpp")}"\n#include "{kernel.file}"\n'
            'extern "C" void run(const void* argument, int blocks, int threads) '
            f"{{ host::run(&{kernel.expression}, argument, blocks, threads); }}\n"
        )
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{kernels_dir()}"]
        subprocess.run(["g++", *options, "-o", text.with_suffix(".so"), text], check=True)
        return ctypes.CDLL(str(text.with_suffix(".so"))).run

    return compile_kernel


@pytest.fixture
def on_host(compiled: Callable[[Kernel], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that asks for kernels gets them, on the CPU; the names of what was launched."""
    launched = []

    def launch(kernel: Kernel, blocks: int, on: Tensor, *values: float) -> None:
        launched.append(kernel.name)
        compiled(kernel)(kernel.arguments.layout.pack(*values), blocks, kernel.threads)

    monkeypatch.setattr(solver.driver, "start", launch)
    monkeypatch.setattr(solver, "target_of", lambda _device: "sm_80")
    monkeypatch.setattr(solver, "runs_on", lambda tensor: True)
    return launched
