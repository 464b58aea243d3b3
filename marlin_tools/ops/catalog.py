"""Every kernel that there is, whatever it computes: for building ahead of time, for the gates of the tests, and for people."""

from collections.abc import Iterator
from dataclasses import dataclass

from marlin_tools.ops.linear.fp8_tiles import fp8_kernels
from marlin_tools.ops.linear.sparse_tiles import sparse_kernels
from marlin_tools.ops.linear.tiles import dense_kernels
from marlin_tools.ops.model.compare import compare_kernels
from marlin_tools.ops.model.decode import decode_kernels
from marlin_tools.ops.model.rotation import rotate_kernels
from marlin_tools.ops.runtime.ahead import side_by_side
from marlin_tools.ops.runtime.compiler import Resources
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import TARGETS
from marlin_tools.ops.solver.kernels import solver_kernels

PURPOSES = {
    "dense": "INT4 products",
    "sparse": "products of 2:4 sparse INT4 weights",
    "fp8": "INT4 products with activations in FP8",
    "decode": "what a decoder does to a token besides products",
    "solver": "quantisation",
    "training": "losses of finetuning",
}
"""What the kernels are for, by family."""


@dataclass(frozen=True)
class BuildReport:
    """One kernel compiled for one target. `cached` is True when nothing had to be compiled."""

    family: str
    kernel: str
    target: str
    resources: Resources
    dynamic_shared_bytes: int
    cached: bool


def kernels(target: str | None = None) -> list[tuple[str, Kernel]]:
    """(family, kernel) of all that exist for a target such as `sm_80`; without one, of every name that there is."""
    if target is None:
        found = (entry for each in TARGETS for entry in kernels(each))
        return list({(family, kernel.name): (family, kernel) for family, kernel in found}.values())
    families = {
        "dense": dense_kernels(target),
        "sparse": sparse_kernels(target),
        "fp8": fp8_kernels(target),
        "decode": decode_kernels(target),
        "solver": [*solver_kernels(target), *rotate_kernels(target)],
        "training": compare_kernels(target),
    }
    return [(family, kernel) for family, members in families.items() for kernel in members]


def build(targets: tuple[str, ...], cache: CubinCache) -> Iterator[BuildReport]:
    """Compile every kernel for every target into the cache. Needs no GPU."""

    def built(wanted: tuple[str, Kernel]) -> BuildReport:
        family, kernel = wanted
        cached = cache.has(kernel)
        resources = cache.get(kernel).resources
        return BuildReport(family, kernel.name, kernel.target, resources, kernel.shared_bytes, cached)

    return side_by_side(built, [each for target in targets for each in kernels(target)])
