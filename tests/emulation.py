"""Kernels on a CPU: their source, compiled for the host, lanes as fibers, PTX as its manual says (`tests/ops/emulated/`).

Who holds which element of a matrix is that of the manual, and copies arrive no sooner than they are waited for. So an index or
a barrier that is wrong is found without a GPU; what tensor cores round is not.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin_tools.resources import kernels_dir

SOURCES = Path(__file__).parent / "ops" / "emulated"


def compiler(folder: Path):
    """Makes a program of `emulated/` with some macros, each once."""
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    made = {}

    def program(source, **macros):
        key = (source, *macros.items())
        if key not in made:
            made[key] = folder / str(len(made))
            options = [f"-D{name}={value}" for name, value in macros.items()]
            include = [f"-I{SOURCES}", f"-I{kernels_dir()}"]
            command = ["g++", "-std=c++17", "-O1", "-w", *include, *options, "-o", made[key], SOURCES / source]
            subprocess.run(command, check=True)
        return made[key]

    return program


def put(folder: Path, **tensors):
    """What a program reads."""
    for name, tensor in tensors.items():
        (folder / name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def found(folder: Path, name: str, dtype: torch.dtype):
    """What it has written."""
    return torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=dtype)


def run(program: Path, folder: Path, *numbers: int):
    subprocess.run([program, folder, *map(str, numbers)], check=True, timeout=300)
