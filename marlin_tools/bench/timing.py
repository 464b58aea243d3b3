"""How kernels are timed: inside CUDA graphs, over weights that do not fit the L2 cache, interleaved with their rivals.

A loop over one weight matrix of a 7B model measures the L2 cache, and a loop of eager calls measures Python. So every
contestant is a list of calls, one per copy of the operands; its graph holds all of them, several times over. Graphs are
replayed in turn (A B C, A B C, ...), so that a drift of the clocks meets all alike; a time is the median over the replays.
Before, they are replayed for a while without being timed: clocks rise from idle, and fall once the power limit is reached.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from marlin_tools.errors import DeviceError

Call = Callable[[], object]

_WARM_UP_SECONDS = 0.15
_EAGER_CALLS = 400


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over the replays, and half the distance between the quartiles."""

    microseconds: float
    spread: float


def gpu(name: str, what: str) -> torch.device:
    """The GPU of this name; `what` "is" or "are" timed there alone."""
    if not torch.cuda.is_available():
        raise DeviceError(f"{what} timed on a GPU, and torch finds none", hint="`marlin-tools doctor` says why")
    return torch.device("cuda", torch.device(name).index or 0)


def copies_past_l2(device: torch.device, weight_bytes: int) -> int:
    """So many copies of a matrix are at least four times the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // weight_bytes))


def time_calls(contestants: Mapping[str, Sequence[Call]], *, calls: int, replays: int = 12) -> dict[str, Timing]:
    """Time each contestant's calls, at least `calls` of them per graph."""
    graphs = {name: _capture(sequence, -(-calls // len(sequence))) for name, sequence in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    warm = time.monotonic() + _WARM_UP_SECONDS
    while time.monotonic() < warm:
        for graph, _ in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    for _ in range(replays):
        for name, (graph, count) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e3 / count)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    return {name: Timing(middle, (high - low) / 2) for name, (low, middle, high) in quartiles.items()}


def host_microseconds(call: Call) -> float:
    """What one eager call costs the host, if the GPU needs less time for it."""
    call()
    torch.cuda.synchronize()
    costs = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_EAGER_CALLS):
            call()
        costs.append((time.perf_counter() - begin) / _EAGER_CALLS)
    torch.cuda.synchronize()
    return statistics.median(costs) * 1e6


def _capture(calls: Sequence[Call], times: int) -> tuple[torch.cuda.CUDAGraph, int]:
    for call in calls[:2]:
        call()  # whatever is compiled or allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    return graph, times * len(calls)
