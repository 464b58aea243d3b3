"""Every kernel of the solver compiles for every target, without a GPU; `compile_kernel` refuses spills and local memory."""

import struct

import pytest

from marlin_tools.ops import TARGETS
from marlin_tools.ops.model.rotation import ROTATE_KERNELS, RotateKernel
from marlin_tools.ops.runtime.compiler import compile_kernel
from marlin_tools.ops.solver import kernels as solver

SHARED_PER_BLOCK = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("routine", solver.ROUTINES, ids=lambda routine: routine.name)
def test_it_compiles_and_fits(routine: solver.Routine, target: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    resources = compile_kernel(routine.source(target), target).resources

    assert 0 < resources.registers <= 128  # two blocks of 256 threads on a multiprocessor
    assert routine.shared_bytes + resources.static_shared_bytes <= SHARED_PER_BLOCK[target] * 1024


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ROTATE_KERNELS, ids=lambda kernel: kernel.name)
def test_rotations_compile(kernel: RotateKernel, target: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert 0 < compile_kernel(kernel.source(target), target).resources.registers <= 64


def test_names_are_unique() -> None:
    assert len({routine.name for routine in solver.ROUTINES}) == len(solver.ROUTINES)


@pytest.mark.parametrize("file", ["sweep.cu", "descend.cu", "search.cu", "choose.cu", "reselect.cu"])
def test_layouts_are_those_of_the_sources(file: str) -> None:
    """Pointers first, then strides, then ints, then floats: so Python's packing and C's agree without padding."""
    argument = f"{file.removesuffix('.cu').capitalize()}Arguments"
    routine = next(routine for routine in solver.ROUTINES if routine.file == file)
    declared = routine.source("sm_80").texts()[f"solver/{file}"].partition(f"struct {argument} {{")[2].partition("};")[0]
    fields = [line.split("//")[0].strip() for line in declared.splitlines() if ";" in line.split("//")[0]]
    pointers = sum("*" in field for field in fields)
    longs = sum(field.startswith("long long") for field in fields)
    ints = sum(field.startswith("int ") for field in fields)

    floats = routine.layout.rpartition("i")[2]
    assert routine.layout == f"{pointers}P{longs if longs > 1 else ''}q{ints}i{floats}"
    assert struct.calcsize(routine.layout) % 4 == 0
