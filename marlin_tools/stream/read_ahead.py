"""Weights on their way to the device, one set ahead of the computation.

A thread reads a set of tensors, checks them and copies them; on a GPU through pinned memory on a stream of its own, so that
disk, bus and computation work at the same time.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import damaged, read_shaped
from marlin_tools.stopwatch import apart

Weights = dict[str, Tensor]


def read_weights(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> Weights:
    """Tensors of these shapes on the device; an error names the one that is not as config.json says, or is not finite."""
    on_gpu = device.type == "cuda"
    weights, finite = {}, []
    for name, shape in shapes.items():
        stored = read_shaped(checkpoint, name, shape, pinned=on_gpu).to(device, non_blocking=True)
        finite.append(torch.isfinite(stored).all())
        weights[name] = stored.to(dtype)
    for name, good in zip(weights, torch.stack(finite).tolist(), strict=True):
        if not good:
            raise damaged(name)
    return weights


class ReadAhead:
    """An iterator over sets of weights that reads the next set while the last one is in use."""

    def __init__(
        self, wanted: Iterator[Mapping[str, torch.Size]], checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._wanted = wanted
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Future[Weights] | None = None

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __next__(self) -> Weights:
        if self._next is None:
            raise StopIteration
        weights = self._next.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            for weight in weights.values():
                weight.record_stream(current)
        self._begin()
        return weights

    def _begin(self) -> None:
        shapes = next(self._wanted, None)
        self._next = None if shapes is None else self._thread.submit(copy_context().run, self._read, shapes)

    @torch.no_grad()
    def _read(self, shapes: Mapping[str, torch.Size]) -> Weights:
        with apart("read"), torch.cuda.stream(self._stream):  # no stream, no effect
            return read_weights(self._checkpoint, shapes, self._device, self._dtype)
