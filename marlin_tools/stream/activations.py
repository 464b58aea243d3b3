"""Where the calibration activations are while the stream works on something else.

All tokens of a calibration set at once are gigabytes, so a decision is made once, from the memory that is free: the residual
stream stays on the device if it takes no more than a quarter of it; else it waits in pinned host memory, or in a mapped file
where the host is short as well, and each chunk is fetched while the one before it is computed with. What a branch computes on
its way is kept as far as there is room, and computed again otherwise; the results are the same to the last bit.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from marlin_tools.checkpoint.output import explained
from marlin_tools.distributed.device import free_memory

_RESIDUAL_SHARE = 0.25
_INPUTS_SHARE = 0.25
_INNER_SHARE = 0.08
"""Shares of the free device memory: for the residual stream, for it with the inputs of a branch, and for what is inside one."""

_HOST_SHARE = 0.5
"""Share of the host memory that was available before that all chunks together may pin."""


@dataclass(frozen=True)
class MemoryBudget:
    """What stays on the device, given what there is of it.

    residual  the residual stream itself, once or twice
    inputs    what the entry linears of a branch read
    inner     as many bytes of what the closing linear of a branch reads
    """

    residual: bool = True
    inputs: bool = False
    inner: int = sys.maxsize

    @classmethod
    def for_sizes(cls, free: int, residual: int) -> "MemoryBudget":
        """Both in bytes. Inputs are as large as the residual stream."""
        return cls(residual <= _RESIDUAL_SHARE * free, 2 * residual <= _INPUTS_SHARE * free, int(_INNER_SHARE * free))


class Activations:
    """A list of chunks. On the device it is just that; elsewhere chunk i + 1 is on its way while chunk i is in use."""

    def __init__(self, device: torch.device, *, on_device: bool = True) -> None:
        self.device = device
        self.on_device = on_device
        self._chunks: list[Tensor] = []
        self._pinned = 0
        self._fetched: tuple[int, Tensor] | None = None
        self._copies = None if on_device else torch.cuda.Stream(device)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, chunk: Tensor) -> None:
        """Keep one more chunk."""
        if self.on_device:
            self._chunks.append(chunk)
            return
        pinned = self._pinned + chunk.nbytes
        if pinned <= _HOST_SHARE * (free_memory(torch.device("cpu")) + self._pinned):
            self._chunks.append(_in_pinned_memory(chunk))
            self._pinned = pinned
        else:
            self._chunks.append(_in_a_file(chunk))
        self[len(self) - 1] = chunk

    def __getitem__(self, index: int) -> Tensor:
        if self._copies is None:
            return self._chunks[index]
        current = torch.cuda.current_stream(self.device)
        known, chunk = self._fetched or (-1, None)
        if chunk is None or known != index:
            chunk = self._fetch(index)
        current.wait_stream(self._copies)
        chunk.record_stream(current)
        self._fetched = (index + 1, self._fetch(index + 1)) if index + 1 < len(self) else None
        return chunk

    def __setitem__(self, index: int, chunk: Tensor) -> None:
        if self._copies is None:
            self._chunks[index] = chunk
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        chunk.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            self._chunks[index].copy_(chunk, non_blocking=True)

    def _fetch(self, index: int) -> Tensor:
        with torch.cuda.stream(self._copies):
            return self._chunks[index].to(self.device, non_blocking=True)

    def copy(self) -> "Activations":
        """The same activations with memory of their own."""
        other = Activations(self.device, on_device=self.on_device)
        for chunk in self:
            other.append(chunk.clone())
        return other

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the chunks."""
        return [tuple(chunk.shape) for chunk in self._chunks]


def _in_pinned_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _in_a_file(like: Tensor) -> Tensor:
    """As much memory as a chunk needs in a file of its own, which is gone once it is; the disk has the room from the start."""
    with tempfile.NamedTemporaryFile(prefix="marlin-tools-activations-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(like.nbytes, 1))
        except OSError as error:
            raise explained(error, Path(file.name), "point TMPDIR at a larger disk") from error
        return torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
