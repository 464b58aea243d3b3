"""Kernels compiled and compared with the reference before an engine may choose them: once in a process for each kind."""

import time
from functools import cache

import torch

from marlin_tools.ops.linear import w4a16, w24a16
from marlin_tools.ops.linear.selftest import check_choices
from marlin_tools.ops.runtime.ahead import compile_ahead
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.serving.vllm import Attempt, log


@cache
def unfit(device_index: int, dtype: torch.dtype, *, sparse: bool, group: int) -> str | None:
    """Why the kernels for such weights cannot be used on this GPU, or None. Compiles them if nobody has."""
    with Attempt("our kernels cannot be used") as attempt:
        return _judge(torch.device("cuda", device_index), dtype, sparse=sparse, group=group)
    return attempt.failure


def _judge(device: torch.device, dtype: torch.dtype, *, sparse: bool, group: int) -> str | None:
    operator = w24a16.OPERATOR if sparse else w4a16.OPERATOR
    target, folder, begin = target_of(device), CubinCache(), time.perf_counter()
    kernels = operator.kernels(device, dtype, group)
    compiled = compile_ahead(list(kernels.values()), folder)
    if compiled:
        took = time.perf_counter() - begin
        log.info("marlin-tools: compiled %d kernels for %s in %.1f s into `%s`", compiled, target, took, folder.folder)
    results = check_choices(device, dtype, kernels, sparse=sparse, group=group)
    failed = [result for result in results if not result.passed]
    return f"self-test: {failed[0].name}: {failed[0].detail}" if failed else None
