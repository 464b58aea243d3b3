"""Every kernel of the solver compiles for Hopper, and each for one of the other targets, which have one source; without a GPU.

`compile_kernel` refuses spills and local memory.
"""

from collections.abc import Callable

import pytest

from marlin_tools.ops import TARGETS
from marlin_tools.ops.model.rotation import rotate_kernels
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.solver.kernels import solver_kernels


def shared_out(make: Callable[[str], list[Kernel]]) -> list[Kernel]:
    return [k for turn, t in enumerate(TARGETS) for k in (make(t) if t == "sm_90a" else make(t)[turn % 3 :: 3])]


SHARED_PER_BLOCK = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227}


@pytest.mark.parametrize("kernel", shared_out(solver_kernels), ids=lambda k: f"{k.name}-{k.target}")
def test_it_compiles_and_fits(kernel: Kernel, kernel_cache: CubinCache) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    resources = kernel_cache.get(kernel).resources

    assert 0 < resources.registers <= 128  # two CTAs of 256 threads on an SM
    assert kernel.shared_bytes + resources.static_shared_bytes <= SHARED_PER_BLOCK[kernel.target] * 1024


@pytest.mark.parametrize("kernel", shared_out(rotate_kernels), ids=lambda k: f"{k.name}-{k.target}")
def test_rotations_compile(kernel: Kernel, kernel_cache: CubinCache) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert 0 < kernel_cache.get(kernel).resources.registers <= 64


def test_names_are_unique() -> None:
    names = [kernel.name for kernel in solver_kernels("sm_80")]
    assert len(set(names)) == len(names)
