"""Compiling before anything runs: as many kernels at a time as there are cores, each once on a machine, whoever asks."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel

Wanted = TypeVar("Wanted")
Made = TypeVar("Made")


def compile_ahead(kernels: Sequence[Kernel], cache: CubinCache) -> int:
    """Put these kernels into the cache; how many of them it lacked.

    Processes that want the same ones share the work: the cache locks each kernel while one process compiles it.
    """
    missing = [kernel for kernel in kernels if not cache.has(kernel)]
    return len(list(side_by_side(cache.get, missing)))


def side_by_side(make: Callable[[Wanted], Made], wanted: Sequence[Wanted]) -> Iterator[Made]:
    """What `make` makes of each, in this order; whoever stops asking waits for those in work alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = ThreadPoolExecutor(cores)  # the compiler lets go of the interpreter
    try:
        yield from threads.map(make, wanted)
    finally:
        threads.shutdown(cancel_futures=True)
