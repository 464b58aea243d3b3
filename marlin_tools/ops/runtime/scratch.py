"""Memory that a kernel needs besides its operands: partial sums, and arrival counters that are zero between calls.

Kernels on one stream run one after another and share; the counters return to zero by themselves. Two streams may run at
once, so each has its own, from the driver and not from torch: torch may hand out memory of a pool that is somebody else's at
that moment, of a graph to come or of weights that sleep.

A captured graph may be replayed on any stream beside eager work, so each capture has its own, allocated from the graph's pool
and cleared by the graph itself. Who replays graphs one at a time shares what the stream that they were captured on has: there
is nothing to clear, and an engine with a graph for each piece of each layer has one scratch instead of hundreds. An engine says
so with `share_among_captures`; torch.compile's own graphs, which have a stream of their own, allow nothing else.
"""

import sys

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver

COUNTER_BYTES = 32768
"""Room for eight counters per block of the largest grid; the partial sums follow."""

_LEAST = 1 << 20

_by_stream: dict[tuple[int, int], tuple[int, int]] = {}  # address and size
_by_capture: dict[tuple[int, int], tuple[int, Tensor]] = {}
_sharing: set[int] = set()


def share_among_captures(device_index: int) -> None:
    """Promise that graphs captured on one stream of this device are never replayed at the same time."""
    _sharing.add(device_index)


def scratch_for(device_index: int, stream: int, partial_bytes: int) -> int:
    """The address of this stream's scratch with room for so many bytes of partial sums."""
    place = (device_index, stream)
    need = COUNTER_BYTES + partial_bytes
    if torch.cuda.is_current_stream_capturing() and not _replayed_in_turn(*place):
        return _for_capture(place, need)
    address, size = _by_stream.get(place, (0, 0))
    if size < need:
        # What was there stays: work in flight and graphs know it. Sizes double, so that is less than is in use.
        size = max(_LEAST, 1 << (need - 1).bit_length())
        address = driver.allocate_cleared(size, device_index)
        _by_stream[place] = (address, size)
    return address


def _replayed_in_turn(device_index: int, stream: int) -> bool:
    """Whether the graph that is being captured is never replayed beside another one of this stream."""
    if device_index in _sharing:
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = trees.get_manager(device_index, create_if_none_exists=False) if trees else None
    return manager is not None and bool(manager.stream.cuda_stream == stream)


def _for_capture(place: tuple[int, int], need: int) -> int:
    """Memory of the graph's own."""
    capture = driver.capture_id(place[1])
    known, captured = _by_capture.get(place, (None, None))
    if captured is None or known != capture or captured.numel() < need:
        captured = torch.empty(need, dtype=torch.uint8, device=torch.device("cuda", place[0]))
        captured[:COUNTER_BYTES].zero_()  # partial sums are written before they are read
        _by_capture[place] = (capture, captured)
    return captured.data_ptr()
