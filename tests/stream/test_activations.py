"""Where activations wait: what stays on a device, and memory of the host that is a file when the host is short."""

import errno
import os

import pytest
import torch

from marlin_tools.errors import OutputError
from marlin_tools.stream import activations
from marlin_tools.stream.activations import Activations, MemoryBudget

GB = 10**9


def test_what_stays_on_a_device() -> None:
    small, large, huge = (MemoryBudget.for_sizes(80 * GB, residual * GB) for residual in (5, 15, 30))
    assert (small.residual, small.inputs) == (True, True)
    assert (large.residual, large.inputs) == (True, False)
    assert (huge.residual, huge.inputs) == (False, False)
    assert 0 < small.inner < 10 * GB
    assert MemoryBudget().inner > 1000 * GB  # a CPU has nowhere else to go


def test_memory_in_a_file() -> None:
    first, second = (activations._in_a_file(torch.empty(3, 5, 7, dtype=torch.bfloat16)) for _ in range(2))
    values = torch.randn(3, 5, 7).to(torch.bfloat16)
    first.copy_(values)
    second.zero_()
    assert torch.equal(first, values)
    assert first.shape == values.shape
    assert first.dtype == torch.bfloat16


def test_half_of_the_host_is_pinned_and_the_rest_lies_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    chunk = torch.ones(10)

    def pin(like: torch.Tensor) -> torch.Tensor:
        pinned.append(torch.empty_like(like))
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: None)
    monkeypatch.setattr(activations, "_in_pinned_memory", pin)
    monkeypatch.setattr(activations, "free_memory", lambda _: (10 - len(pinned)) * chunk.nbytes)
    for expected in (5, 7):  # then half of the half that is left
        kept = Activations(torch.device("cpu"), on_device=False)
        for number in range(9):
            kept.append(chunk * number)
        assert [float(each[0]) for each in kept] == list(range(9))
        assert len(pinned) == expected


def test_a_disk_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no space left for `.*marlin-tools-activations"):
        activations._in_a_file(torch.empty(8))


def test_available_memory_is_known() -> None:
    assert activations.free_memory(torch.device("cpu")) > 1_000_000


def test_on_the_device_it_is_a_list_and_a_copy_is_its_own() -> None:
    kept = Activations(torch.device("cpu"))
    for value in (1.0, 2.0):
        kept.append(torch.full((2, 3), value))
    other = kept.copy()
    other[0] = torch.zeros(2, 3)
    other[1].add_(1)
    assert [float(chunk.mean()) for chunk in kept] == [1, 2]
    assert [float(chunk.mean()) for chunk in other] == [0, 3]
    assert kept.shapes() == [(2, 3), (2, 3)]
