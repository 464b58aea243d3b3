"""Memory that a kernel needs besides its operands: partial sums, and arrival counters that are zero between calls.

Kernels on one stream run one after another and share; the counters return to zero by themselves. Two streams may run at
once, so each has its own. A captured graph may be replayed on any stream beside eager work, so each capture has its own,
allocated from the graph's pool and cleared by the graph itself.

An engine that replays its graphs one at a time says so with `share_among_captures`. Its graphs then use what the stream that
they were captured on has, which is cleared once and for all: a graph has nothing to clear, and an engine with a graph for each
piece of each layer has one scratch instead of hundreds. Work that is not captured needs another stream than the captures.
"""

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver

COUNTER_BYTES = 32768
"""Room for eight counters per block of the largest grid; the partial sums follow."""

_by_stream: dict[tuple[int, int], Tensor] = {}
_by_capture: dict[tuple[int, int], tuple[int, Tensor]] = {}
_sharing: set[int] = set()
_captured: dict[int, Tensor] = {}  # by address, which graphs have; never freed


def share_among_captures(device_index: int) -> None:
    """Promise that graphs captured on one stream of this device are never replayed at the same time."""
    _sharing.add(device_index)


def forget(device_index: int) -> None:
    """Give back what no graph uses: it was allocated where it must not stay."""
    torch.cuda.synchronize(device_index)
    for place in [place for place in _by_stream if place[0] == device_index]:
        del _by_stream[place]


def scratch_for(device_index: int, stream: int, partial_bytes: int) -> int:
    """The address of this stream's scratch with room for so many bytes of partial sums."""
    place = (device_index, stream)
    need = COUNTER_BYTES + partial_bytes
    if torch.cuda.is_current_stream_capturing():
        return _for_capture(place, need)
    scratch = _by_stream.get(place)
    if scratch is None or scratch.numel() < need:
        scratch = _by_stream[place] = _make(need, device_index)
    return scratch.data_ptr()


def _for_capture(place: tuple[int, int], need: int) -> int:
    device_index, stream = place
    shared = _by_stream.get(place) if device_index in _sharing else None
    if shared is not None and shared.numel() >= need:  # warmed up: it was cleared before the capture
        _captured[shared.data_ptr()] = shared
        return shared.data_ptr()
    capture = driver.capture_id(stream)
    known, captured = _by_capture.get(place, (None, None))
    if captured is None or known != capture or captured.numel() < need:
        captured = _make(need, device_index)
        _by_capture[place] = (capture, captured)
    return captured.data_ptr()


def _make(size: int, device_index: int) -> Tensor:
    """Only the counters are cleared: partial sums are written before they are read."""
    scratch = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device_index))
    scratch[:COUNTER_BYTES].zero_()
    return scratch
