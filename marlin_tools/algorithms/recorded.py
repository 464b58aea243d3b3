"""Many small weights of one shape on a GPU: their solving is recorded once, as a CUDA graph, and played for each of them.

The experts of a block are small. To start the five hundred kernels that solve one takes longer than to run them, and most of
them leave the GPU idle, so recordings are played without Python and several at a time, each with memory of its own.

What a recording cannot do is to look at a number on the way: where a Hessian has no factor or a scale is not finite, the weight
is solved once more in the usual way, which raises the damping or says what is wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlin_tools.algorithms.gptq import GPTQ
from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.algorithms.solution import Solution, solve_all
from marlin_tools.stopwatch import span, unwatched

AT_ONCE = 4
"""Recordings of a shape that are played at a time, to cover each other's gaps."""

SMALL = 1 << 24
"""Weights of a matrix, at most, that recording pays for; more keep a GPU busy."""


class Recordings:
    """Solves weights of few shapes, and keeps the recordings of each. `dtype` is the model's own 16-bit type."""

    def __init__(self, settings: GPTQ, dtype: torch.dtype) -> None:
        self._settings, self._dtype = settings, dtype
        self._by_shape: dict[tuple[int, int, int], list[_Recording]] = {}

    def solve(self, asked: Sequence[tuple[str, Tensor, Hessian]], group: int) -> list[Solution]:
        """A solution for each weight, by its name and with its Hessian, all of one shape; the same as `solve_all` gives."""
        if asked[0][1].numel() > SMALL:
            return [self._usual(*each, group) for each in asked]
        n, k = asked[0][1].shape
        if (n, k, group) not in self._by_shape:
            like = asked[0][1]
            self._by_shape[n, k, group] = [_Recording(self._settings, self._dtype, like, group) for _ in range(AT_ONCE)]
        players = self._by_shape[n, k, group]
        with span("solve"):
            noise = self._settings.noise
            played = [players[i % AT_ONCE].play(weight, hessian.unsure(noise)) for i, (_, weight, hessian) in enumerate(asked)]
            for player in players:
                torch.cuda.current_stream(asked[0][1].device).wait_stream(player.stream)
            fine = torch.stack([each for _, each in played]).tolist()
        return [
            solution if good else self._usual(*each, group)
            for each, (solution, _), good in zip(asked, played, fine, strict=True)
        ]

    def _usual(self, name: str, weight: Tensor, hessian: Hessian, group: int) -> Solution:
        return solve_all(self._settings.problem(name, hessian, group, self._dtype), weight)


class _Recording:
    """The solving of one weight, in memory of its own."""

    def __init__(self, settings: GPTQ, dtype: torch.dtype, like: Tensor, group: int) -> None:
        n, k = like.shape
        self.stream = torch.cuda.Stream(like.device)
        self._weight = torch.ones_like(like)
        self._matrix = torch.eye(k, device=like.device)
        self._noise, self._spread = torch.zeros(2, dtype=torch.float64, device=like.device)
        self._graph = torch.cuda.CUDAGraph()

        def solve() -> tuple[Solution, Tensor]:
            hessian = Hessian(self._matrix, 1, noise=self._noise, spread=self._spread)
            problem, failed = settings.attempt(hessian, group, dtype)
            solution = problem.solve(self._weight, slice(0, n))
            fine = (failed == 0) & torch.isfinite(solution.linear.scales).all() & torch.isfinite(self._matrix).all()
            return solution, fine

        self.stream.wait_stream(torch.cuda.current_stream(like.device))
        with unwatched(), torch.cuda.stream(self.stream):
            solve()  # what is only done once is done
            self.stream.synchronize()
            with torch.cuda.graph(self._graph, stream=self.stream, capture_error_mode="thread_local"):
                self._solution, self._fine = solve()

    def play(self, weight: Tensor, hessian: Hessian) -> tuple[Solution, Tensor]:
        """The solution, and whether it is one, once this stream has come here."""
        solution, fine = self._solution.map(torch.empty_like), torch.empty_like(self._fine)
        targets, sources = solution.tensors(), self._solution.tensors()
        self.stream.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.cuda.stream(self.stream):
            self._weight.copy_(weight)
            self._matrix.copy_(hessian.matrix)
            self._noise.fill_(hessian.noise)
            self._spread.fill_(hessian.spread)
            self._graph.replay()
            for target, source in zip((*targets, fine), (*sources, self._fine), strict=True):
                target.copy_(source)
        return solution, fine
