"""Compiling before anything runs: as many kernels at a time as there are cores, each once on a machine, whoever asks."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel


def compile_ahead(kernels: Sequence[Kernel], cache: CubinCache) -> int:
    """Put these kernels into the cache; how many of them it lacked.

    Processes that want the same ones share the work: the cache locks each kernel while one process compiles it.
    """
    missing = [kernel for kernel in kernels if not cache.has(kernel)]
    if missing:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(cores, len(missing))) as threads:  # the compiler lets go of the interpreter
            list(threads.map(cache.get, missing))
    return len(missing)
