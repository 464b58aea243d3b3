"""Results on their way to the host, on a stream of their own, so that the computation goes on meanwhile.

ready = copies.mark()               # on the thread that computes: everything up to here is wanted
copies.fetch(tensors, ready)        # on another thread: the same tensors in host memory
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Copies from one device; on a CPU nothing has to be copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """The moment at which all that has been asked of the device so far is done."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def fetch(self, tensors: Mapping[str, Tensor], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
        """The tensors on the host, once `ready` has come; waits for them."""
        if self._stream is None or ready is None:
            return dict(tensors)
        fetched = {}
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for name, tensor in tensors.items():
                if tensor.is_cuda:
                    source = tensor.contiguous()
                    fetched[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
                    fetched[name].copy_(source, non_blocking=True)
                else:
                    fetched[name] = tensor
            self._stream.synchronize()
        return fetched
