"""Results on their way to the host, on a stream of their own, so that the computation goes on meanwhile.

ready = copies.mark()               # on the thread that computes: everything up to here is wanted
copies.fetch(tensors, ready)        # on another thread: the same tensors in host memory
"""

from collections import defaultdict
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
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            fetched = fetched_together(tensors)
            self._stream.synchronize()
        return fetched


def fetched_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host once the stream comes to it. Parts of one allocation travel together: each copy costs."""
    parts: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        source = tensor.contiguous()
        parts[source.untyped_storage().data_ptr()][name] = source
    fetched = {}
    for sources in parts.values():
        places = {name: _bytes(source) for name, source in sources.items()}
        first, stop = min(each.start for each in places.values()), max(each.stop for each in places.values())
        some = next(iter(sources.values()))
        whole = some.new_empty(0, dtype=torch.uint8).set_(some.untyped_storage())
        host = torch.empty(stop - first, dtype=torch.uint8, pin_memory=some.is_cuda)
        host.copy_(whole[first:stop], non_blocking=True)
        for name, source in sources.items():
            own = slice(places[name].start - first, places[name].stop - first)
            fetched[name] = host[own].view(source.dtype).view(source.shape)
    return {name: fetched[name] for name in tensors}


def _bytes(tensor: Tensor) -> slice:
    """Where in its allocation a contiguous tensor is."""
    start = tensor.storage_offset() * tensor.element_size()
    return slice(start, start + tensor.nbytes)
