"""Memory that a kernel needs besides its operands: partial sums, and arrival counters that are zero between calls.

Kernels on one stream run one after another and share; the counters return to zero by themselves. Two streams may run at
once, so each has its own. A captured graph may be replayed on any stream beside eager work, so each capture has its own,
allocated from the graph's pool and cleared by the graph itself.
"""

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver

COUNTER_BYTES = 32768
"""Room for eight counters per block of the largest grid; the partial sums follow."""

_by_stream: dict[tuple[int, int], Tensor] = {}
_by_capture: dict[tuple[int, int], tuple[int, Tensor]] = {}


def scratch_for(device_index: int, stream: int, partial_bytes: int) -> int:
    """The address of this stream's scratch with room for so many bytes of partial sums."""
    place = (device_index, stream)
    need = COUNTER_BYTES + partial_bytes
    if torch.cuda.is_current_stream_capturing():
        capture = driver.capture_id(stream)
        known, captured = _by_capture.get(place, (None, None))
        if captured is None or known != capture or captured.numel() < need:
            captured = _make(need, device_index)
            _by_capture[place] = (capture, captured)
        return captured.data_ptr()
    scratch = _by_stream.get(place)
    if scratch is None or scratch.numel() < need:
        scratch = _by_stream[place] = _make(need, device_index)
    return scratch.data_ptr()


def _make(size: int, device_index: int) -> Tensor:
    """Only the counters are cleared: partial sums are written before they are read."""
    scratch = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device_index))
    scratch[:COUNTER_BYTES].zero_()
    return scratch
