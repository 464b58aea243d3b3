"""Every kernel that there is, whatever it computes: for building ahead of time, for the gates of the tests, and for people."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from marlin_tools.ops.linear.sparse_variants import sparse_kernels
from marlin_tools.ops.linear.variants import dense_kernels
from marlin_tools.ops.model.decode import decode_kernels
from marlin_tools.ops.model.rotation import ROTATE_KERNELS
from marlin_tools.ops.runtime.compiler import Resources
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.driver import Kernel
from marlin_tools.ops.solver.kernels import ROUTINES

PURPOSES = {
    "dense": "INT4 products",
    "sparse": "products of 2:4 sparse INT4 weights",
    "decode": "what a decoder does to a token besides products",
    "solver": "quantisation",
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
    """(family, kernel) of all that exist, or that exist for a target such as `sm_80`."""
    families: dict[str, Sequence[Kernel]] = {
        "dense": dense_kernels(target),
        "sparse": sparse_kernels(target),
        "decode": decode_kernels(),
        "solver": (*ROUTINES, *ROTATE_KERNELS),
    }
    return [(family, kernel) for family, members in families.items() for kernel in members]


def build(targets: tuple[str, ...], cache: CubinCache) -> Iterator[BuildReport]:
    """Compile every kernel for every target into the cache, one after another. Needs no GPU."""
    for target in targets:
        for family, kernel in kernels(target):
            source = kernel.source(target)
            cached = cache.has(source, target)
            resources = cache.get(source, target).resources
            yield BuildReport(family, kernel.name, target, resources, kernel.dynamic_shared_bytes(target), cached)
