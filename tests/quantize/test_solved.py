"""Linears that were solved together, taken apart again."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_tools.algorithms.solution import Losses, Solution
from marlin_tools.compress import solved as module
from marlin_tools.compress.solved import Solved, solve_experts
from marlin_tools.distributed.team import Team
from marlin_tools.quantized import QuantizedLinear


def solution(n: int, k: int = 64, seed: int = 0) -> Solution:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, k // 32, generator=generator).to(torch.float16)
    losses = [torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]
    return Solution(QuantizedLinear(codes, scales, 32), Losses(*losses), 0.01)


def test_every_linear_has_its_own_rows_however_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solution(50)
    rows = {"c": slice(30, 50), "a": slice(0, 10), "b": slice(10, 20)}  # 20 to 30 is nobody's
    for at_once in (1, 10 * 64, 20 * 64, 1 << 20):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        linears = Solved(whole, rows, {"a": 0.01, "b": 0.1, "c": 1.0})
        values = dict(linears.values(torch.float32))
        assert sorted(values) == sorted(rows)
        for name, value in values.items():
            assert torch.equal(value, whole.value(torch.float32)[rows[name]])
        for name, each in linears.each():
            assert torch.equal(each.linear.codes, whole.linear.codes[rows[name]])
            assert each.damp == linears.damps[name]
            assert linears.errors()[name] == (each.output_error, each.weight_error)
        assert list(linears.errors()) == ["c", "a", "b"]


def test_without_data_nothing_is_said_of_the_output() -> None:
    known = solution(8).losses
    linear = Solved.of("x", Solution(solution(8).linear, Losses(None, None, known.weight, known.weight_energy), None))
    ((output, weight),) = linear.errors().values()
    assert output is None
    assert weight == float(known.weight.sum()) / float(known.weight_energy.sum())


@dataclass(frozen=True)
class Thread(Team):
    """Stands for a process of two."""

    size: int = 2
    told: list[torch.Tensor] = field(default_factory=list)
    barrier: Barrier = field(default_factory=lambda: Barrier(2, timeout=20))

    def each(self, own: torch.Tensor) -> torch.Tensor:
        self.told[self.rank] = own
        self.barrier.wait()
        whole = torch.cat(self.told)
        self.barrier.wait()
        return whole


def test_every_expert_has_its_own_rows_whichever_process_solved_it() -> None:
    """Five of two linears each, so the last is solved by both."""
    groups: list[Any] = [
        SimpleNamespace(n=i, rows=lambda i=i: [(f"{i}.gate", slice(0, 8)), (f"{i}.up", slice(8, 20))]) for i in range(5)
    ]
    solutions = [replace(solution(20, seed=i), damp=0.1 * i) for i in range(5)]
    told, barrier = [torch.empty(0)] * 2, Barrier(2, timeout=20)

    def solve(rank: int) -> Solved:
        team = Thread(rank, told=told, barrier=barrier)
        return solve_experts(groups, lambda _: pytest.fail("all at once"), team, lambda mine: [solutions[g.n] for g in mine])

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(solve, range(2)):
            linears = dict(found.each())
            assert set(linears) == {name for group in groups for name, _ in group.rows()}
            for group, expected in zip(groups, solutions, strict=True):
                for name, rows in group.rows():
                    assert torch.equal(linears[name].linear.codes, expected.linear.codes[rows])
                    assert linears[name].damp == expected.damp


class Large(TorchDispatchMode):
    """Keeps the large tensors in float32 that are made within."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least, self.made = least, dict[int, torch.Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.numel() >= self._least:
            self.made[out.untyped_storage().data_ptr()] = out
        return out


def test_values_take_the_memory_of_themselves_and_no_more() -> None:
    """Those of many linears at once are large where each alone is small."""
    linear = solution(50).linear
    with Large(50 * 64) as large:
        value = linear.dequantize()
    assert len(large.made) == 1
    expected = (linear.codes.float() - 8) * linear.scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(value, expected)
    across = QuantizedLinear(linear.codes.T.contiguous().T, linear.scales, 32)
    assert torch.equal(across.dequantize(), expected)
