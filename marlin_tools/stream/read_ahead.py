"""Weights on their way to the device, one set ahead of the computation.

A thread reads a set of tensors, checks them and copies them; on a GPU through pinned memory on a stream of its own, so that
disk, bus and computation work at the same time.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import damaged, mismatched, read_shaped
from marlin_tools.families.layout import WeightRef
from marlin_tools.stopwatch import apart

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class WeightRequest:
    """A weight of the model: where it lies, its shape, and whether it takes the type that the model computes in."""

    ref: WeightRef
    shape: torch.Size
    cast: bool = True


def read_weights(
    checkpoint: Checkpoint, asked: Mapping[str, WeightRequest], device: torch.device, dtype: torch.dtype
) -> Weights:
    """These weights on the device; an error names the one that is not as config.json says, or is not finite."""
    on_gpu = device.type == "cuda"
    weights: Weights = {}
    finite: dict[str, Tensor] = {}
    stored: tuple[str, Tensor] | None = None  # a tensor that holds all experts is read once
    for name, each in asked.items():
        tensor = each.ref.tensor
        if each.ref.whole:
            weight = read_shaped(checkpoint, tensor, each.shape, pinned=on_gpu).to(device, non_blocking=True)
        else:
            if each.ref.shape(checkpoint) != tuple(each.shape):
                raise mismatched(tensor, each.ref.shape(checkpoint), each.shape)
            if stored is None or stored[0] != tensor:
                stored = tensor, read_shaped(checkpoint, tensor, checkpoint.shape(tensor), pinned=on_gpu)
            weight = each.ref.take(stored[1]).contiguous().to(device)
        good = torch.isfinite(weight).all()
        finite[tensor] = finite[tensor] & good if tensor in finite else good
        weights[name] = weight.to(dtype) if each.cast else weight
    for tensor, good in zip(finite, torch.stack(list(finite.values())).tolist(), strict=True):
        if not good:
            raise damaged(tensor)
    return weights


class ReadAhead:
    """An iterator over sets of weights that reads the next set while the last one is in use."""

    def __init__(
        self, wanted: Iterator[Mapping[str, WeightRequest]], checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
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
        asked = next(self._wanted, None)
        self._next = None if asked is None else self._thread.submit(copy_context().run, self._read, asked)

    @torch.no_grad()
    def _read(self, asked: Mapping[str, WeightRequest]) -> Weights:
        with apart("read"), torch.cuda.stream(self._stream):  # no stream, no effect
            return read_weights(self._checkpoint, asked, self._device, self._dtype)
