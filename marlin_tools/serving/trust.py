"""Kernels compiled and compared with the reference before an engine may choose them: once in a process for each kind."""

import time
from functools import cache

import torch

from marlin_tools.ops.linear import w4a8
from marlin_tools.ops.linear.fp8_tiles import round_kernels
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.selftest import check_choices
from marlin_tools.ops.runtime.ahead import compile_ahead
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.serving.vllm import Attempt, log


@cache
def unfit(device_index: int, dtype: torch.dtype, operator: LinearOperator, group: int) -> str | None:
    """Why an operator's kernels for such weights cannot be used on this GPU, or None. Compiles them if nobody has."""
    with Attempt("our kernels cannot be used") as attempt:
        return _judge(torch.device("cuda", device_index), dtype, operator, group)
    return attempt.failure


def _judge(device: torch.device, dtype: torch.dtype, operator: LinearOperator, group: int) -> str | None:
    target, folder, begin = target_of(device), CubinCache(), time.perf_counter()
    kernels = operator.kernels(device, dtype, group)
    rounding = round_kernels(dtype, target) if operator is w4a8.OPERATOR else []
    compiled = compile_ahead([*kernels.values(), *rounding], folder)
    if compiled:
        took = time.perf_counter() - begin
        log.info("marlin-tools: compiled %d kernels for %s in %.1f s into `%s`", compiled, target, took, folder.folder)
    results = check_choices(device, dtype, kernels, operator, group)
    failed = [result for result in results if not result.passed]
    return f"self-test: {failed[0].name}: {failed[0].detail}" if failed else None
