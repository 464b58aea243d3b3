"""Where activations wait: what stays on a device, and memory of the host that is a file when the host is short."""

import pytest
import torch

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


def test_a_file_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free_memory", lambda _: 0)
    first, second = (activations._host_memory(torch.empty(3, 5, 7, dtype=torch.bfloat16)) for _ in range(2))
    values = torch.randn(3, 5, 7).to(torch.bfloat16)
    first.copy_(values)
    second.zero_()
    assert torch.equal(first, values)
    assert first.shape == values.shape
    assert first.dtype == torch.bfloat16
    assert not first.is_pinned()


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
