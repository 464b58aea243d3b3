"""What a run will take, from shapes alone, and how far off that was.

Time is the floor of each part (`floor.py`), taken at the rate that this machine shows for a matrix product at this moment,
times what the part was measured to take of its floor; what is not arithmetic, the walk along the columns and the search for
scales, has constants of its own. Where nobody has measured that (round-to-nearest, pruning, 2:4, tuning) no time is foretold,
nor of a mixture of experts, whose time goes to starting kernels.
Memory is that of the moment at which most is alive.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from marlin_tools.algorithms import GPTQ, RTN, Pruner
from marlin_tools.algorithms.recorded import AT_ONCE, SMALL
from marlin_tools.algorithms.solution import SLAB
from marlin_tools.checkpoint.output import check_space, gigabytes
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.floor import Work, least_seconds, works
from marlin_tools.compress.guide import LOOKED_AT, WIDEST
from marlin_tools.distributed.device import matmul_rate, peak_memory
from marlin_tools.distributed.team import ALONE, PARTS, SLABS, Team, expected
from marlin_tools.errors import DeviceError
from marlin_tools.stream.activations import MemoryBudget
from marlin_tools.stream.inventory import Inventory, Target
from marlin_tools.stream.layer_stream import CHUNK_TOKENS
from marlin_tools.stream.routed import hessians_room

_TAKES = {
    "cuda": {
        "forward": 1.4,
        "hessian": 1.45,
        "drift": 1.16,
        "factor": 1.8,
        "correct": 2.6,
        "sweep": 2.1,
        "polish": 2,
        "judge": 3,
    },
    "cpu": {"forward": 1.8, "hessian": 3.6, "drift": 1.8, "factor": 1, "correct": 4, "sweep": 2, "polish": 4, "judge": 2},
}
"""Seconds of each part over those of its floor: on an H100 with the shapes of Llama-2-7B and 70B, and on a CPU."""
_SEARCH_NS = {"cpu": 0.55, "cuda": 0.001}
"""Nanoseconds per weight and scale candidate."""
_COLUMN_US = {"cpu": 25.0, "cuda": 0.8}
"""Microseconds per column of the sweep and of each pass of coordinate descent, on top of the arithmetic."""
_CORNER_US = {"cpu": 0.0, "cuda": 1.8}
"""Microseconds per column of the factorisation, whose diagonal blocks fill no GPU."""
_START = {"cpu": 1.0, "cuda": 2.5}
"""Seconds until the first block and after the last one, whatever the model."""
_HASHED = {"cpu": 1e9, "cuda": 4e9}
"""Bytes of a checkpoint that are read and hashed in a second; machines with a GPU have more cores for it."""
_PROCESS_GB = {"cpu": 0.75, "cuda": 2.9}
"""Host memory of the process with its libraries loaded."""
_PINNED = 1.1
"""Host memory of a GPU run, in bytes of a block: the next one on its way in, the last one on its way out."""
_TUNED_WEIGHT = 44
"""Bytes for each weight of a block that is tuned, all in float32: its place, offset, gradient, two moments, the best offset so
far, and what stays of its way to a value until the gradient is known."""
_WORTH = 32
"""Bytes for each element of G, the worth of a linear's outputs, while it is factorised: G in its order, in float64, R."""
_INVERSES = 7
"""Matrices of the size of a Hessian that alternating directions add."""
_ALLOCATOR = {"cpu": 1.2, "cuda": 1.05}
"""What the allocator keeps beyond what is asked for."""


@dataclass(frozen=True)
class Forecast:
    """Peak memory, disk and time of a run, and what was assumed; `done` is what happens to the linears.

    Of several processes, each needs this memory. `seconds` is None where the time is not known well enough.
    """

    device: torch.device
    host_gb: float
    gpu_gb: float | None
    disk_gb: float
    seconds: float | None
    linears: int
    kept: int
    done: str
    processes: int = 1
    started: float = field(default_factory=time.perf_counter)

    def lines(self) -> list[tuple[str, str]]:
        """What and how much, for people."""
        rows = [("linears", f"{self.linears} {self.done}, {self.kept} kept as they are"), ("device", str(self.device))]
        each = ""
        if self.processes > 1:
            whose = "each with a GPU of its own" if self.gpu_gb is not None else "on the CPU"
            rows[-1] = ("devices", f"{self.processes} processes, {whose}")
            each = ", in each process"
        rows.append(("host memory", f"{self.host_gb:.1f} GB at the peak{each}"))
        if self.gpu_gb is not None:
            rows.append(("GPU memory", f"{self.gpu_gb:.1f} GB at the peak{each}"))
        rows.append(("disk", gigabytes(self.disk_gb)))
        return rows if self.seconds is None else [*rows, ("time", _spell(self.seconds))]

    def check(self, out: Path) -> None:
        """Refuse what cannot end well."""
        check_space(out, self.disk_gb)
        if self.gpu_gb is not None:
            available = torch.cuda.mem_get_info(self.device)[0] / 1e9
            if available < self.gpu_gb:
                raise DeviceError(
                    f"`{self.device}` has {available:.1f} GB free, the run needs about {self.gpu_gb:.1f} GB",
                    hint="use fewer or shorter samples (`--num-samples`, `--seqlen`), or another `--device`",
                )

    def compare(self, seconds: float) -> dict[str, dict[str, float]]:
        """Forecast and reality side by side; goes into the manifest and to the user."""
        real = {"seconds": seconds, **peak_memory(self.device)}
        expected = {"seconds": self.seconds, "host_gb": self.host_gb, "gpu_gb": self.gpu_gb}
        return {
            "forecast": {key: round(value, 2) for key, value in expected.items() if value is not None},
            "real": {key: round(value, 2) for key, value in real.items()},
        }


def in_words(times: Mapping[str, Mapping[str, float]]) -> str:
    """What `compare` found, in one line."""
    units = {"seconds": "{:.0f} s", "host_gb": "{:.1f} GB of host memory", "gpu_gb": "{:.1f} GB of GPU memory"}
    real, expected = times["real"], times["forecast"]
    parts = [f"{units[key].format(real[key])} (forecast {expected[key]:.1f})" for key in units if key in expected]
    return "took " + ", ".join(parts if "seconds" in expected else [units["seconds"].format(real["seconds"]), *parts])


def forecast_quantize(
    checkpoint: Checkpoint,
    inventory: Inventory,
    solver: RTN | GPTQ,
    text: tuple[int, int],
    device: torch.device,
    *,
    pruner: Pruner | None = None,
    also: Literal["tuning", "choice"] | None = None,
) -> Forecast:
    """Count the work of each kind of block and multiply. Processes share the work.

    text     (tokens, the longest sequence); no tokens where no data is needed
    pruner   chooses masks, if any
    also     tuning of each block, in one process; or a choice, before all else, of what stays dense. Both keep what a block
             reads and puts out beside
    """
    known = isinstance(solver, GPTQ) and not solver.guided and pruner is None and also is None
    timed = known and all(t.share == 1 for t in inventory.targets)
    team = ALONE if also == "tuning" else expected()
    more: dict[str, Any] = {"trained": also is not None, "tuned": also == "tuning", "pruner": pruner, "team": team}
    return _forecast(checkpoint, inventory, solver, _Load(*text, 0.52, "quantised", timed=timed, **more), device)


def forecast_prune(
    checkpoint: Checkpoint,
    inventory: Inventory,
    solver: Pruner,
    text: tuple[int, int],
    device: torch.device,
    *,
    trained: bool = False,
) -> Forecast:
    """The same for pruning; `trained` if each block is trained afterwards."""
    return _forecast(checkpoint, inventory, solver, _Load(*text, 2, "pruned", trained=trained, pruner=solver), device)


def _spell(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class _Load:
    """What goes through a run: tokens, what comes out per weight, what that is called, who prunes, and by whom it is done."""

    tokens: int
    longest: int
    bytes_per_weight: float
    done: str
    timed: bool = False
    trained: bool = False
    tuned: bool = False
    pruner: Pruner | None = None
    team: Team = ALONE

    @property
    def rows(self) -> int:
        """Among how many the rows are shared."""
        return min(self.team.size, SLABS)

    @property
    def walks(self) -> int:
        """How often the columns are walked along for the rows of one process."""
        return SLABS // self.rows if self.team.cuts else 1

    def share(self, part: str) -> int:
        """Among how many a part of the work is shared."""
        by_text = {"forward", "hessian", "drift"}
        return self.team.size if part in by_text else 1 if part == "factor" else self.rows


def _forecast(
    checkpoint: Checkpoint, inventory: Inventory, solver: RTN | GPTQ | Pruner, load: _Load, device: torch.device
) -> Forecast:
    on_gpu = device.type == "cuda"
    blocks = works(inventory, load.tokens, load.longest)
    stored = sum(t.n * t.k for t in inventory.targets)
    working = _ALLOCATOR[device.type] * max(_working_bytes(work, solver, device, load) for work, _ in blocks) / 1e9
    largest = max(work.weights for work, _ in blocks)
    process = _PROCESS_GB[device.type]
    return Forecast(
        device=device,
        host_gb=process + (_PINNED * 2 * largest / 1e9 if on_gpu else working),
        gpu_gb=working if on_gpu else None,
        disk_gb=(checkpoint.nbytes - 2 * stored + stored * load.bytes_per_weight + _guide_bytes(blocks, solver, device)) / 1e9,
        seconds=_seconds(blocks, solver, load, device, checkpoint.nbytes) if load.timed else None,
        linears=len(inventory.targets),
        kept=len(inventory.kept),
        done=load.done,
        processes=load.team.size,
    )


def _working_bytes(work: Work, solver: RTN | GPTQ | Pruner, device: torch.device, load: _Load) -> float:
    """The most that is alive at once: what flows, what stays of it inside a branch, the block, and one group's solution."""
    on_gpu = device.type == "cuda"
    element = 2 if on_gpu else 4
    weights = work.weights * element * (1 + on_gpu + bool(solver.drift))
    if isinstance(solver, RTN) or not work.tokens:
        return weights + max((_solver_bytes(group, on_gpu=on_gpu) for group in work.groups if group), default=0)
    tokens = work.tokens // load.team.size
    twice = solver.drift or not solver.staged or load.trained
    flowing = tokens * work.hidden * element * ((2 if twice else 1) + load.trained)
    room = MemoryBudget.for_sizes(torch.cuda.mem_get_info(device)[0], flowing) if on_gpu else MemoryBudget()
    residual = flowing if room.residual else 0
    chunk = min(max(CHUNK_TOKENS, work.longest), tokens) * element
    sums = (PARTS // load.team.size).bit_length() if load.team.cuts else 0
    most = 0
    for group in work.groups:
        k = group[0].k if group else 0
        inner = min(room.inner, tokens * k * element)
        kept = inner if len(group) == 1 else residual if room.inputs else 0
        expert = bool(group) and group[0].share < 1
        if expert:
            kept += max(1, sums) * _waiting(work, k, device, load.team) + (_recorded(work) if on_gpu else 0)
        solved = _solver_bytes(group, on_gpu=on_gpu, slabs=SLABS if load.team.cuts and not expert else 1) if group else 0
        solved += _mask_bytes(group, load.pruner, on_gpu=on_gpu) if group and load.pruner is not None else 0
        summed = sums * 4 * k * (k + bool(solver.drift) * (group[0].n if len(group) == 1 else k))
        most = max(most, residual + kept + max(solved, summed), residual + kept + summed + 6 * chunk * k)
    if solver.guided:
        outputs = [t.n for group in work.groups for t in group if t.share == 1 and t.n <= WIDEST]
        weights += 4 * sum(n * n for n in outputs) + _WORTH * max(outputs, default=0) ** 2
    if load.tuned or solver.guided:
        passed = sum(group[0].k + sum(t.n for t in group) for group in work.groups if group)
        most = max(most, residual + load.tuned * _TUNED_WEIGHT * work.solved + 8 * chunk // element * passed)
    return weights + most


def _guide_bytes(blocks: Sequence[tuple[Work, int]], solver: RTN | GPTQ | Pruner, device: torch.device) -> int:
    """On the disk while it lasts: what each block reads of the text that is read ahead, or a gradient in its place."""
    if not solver.guided:
        return 0
    element = 2 if device.type == "cuda" else 4
    return sum(count * min(work.tokens, LOOKED_AT + work.longest) * work.hidden * element for work, count in blocks)


def _waiting(work: Work, k: int, device: torch.device, team: Team) -> int:
    """Hessians of experts with so many inputs: all that are looked at together wait to be solved."""
    experts = sum(bool(group) and group[0].share < 1 and group[0].k == k for group in work.groups)
    return min(experts * 4 * k * k, hessians_room(device, cuts=team.cuts))


def _recorded(work: Work) -> int:
    """Recordings of how experts are solved."""
    shapes = {(sum(t.n for t in group), group[0].k): group for group in work.groups if group and group[0].share < 1}
    return AT_ONCE * sum(_solver_bytes(group, on_gpu=True) for (n, k), group in shapes.items() if n * k <= SMALL)


def _solver_bytes(group: Sequence[Target], *, on_gpu: bool, slabs: int = 1) -> int:
    """H, the same in another order and in float64; then about ten float32 matrices of as many rows as are solved at a time."""
    n, k = sum(t.n for t in group), group[0].k
    rows = min(n // slabs, max(1, SLAB // k)) if on_gpu else n // slabs
    return 2 * n * k + max(16 * k * k, 12 * k * k + 40 * rows * k)


def _mask_bytes(group: Sequence[Target], pruner: Pruner, *, on_gpu: bool) -> int:
    """What choosing and fitting 2:4 weights takes more, as measured: H once more, and some eight matrices of as many rows.

    Alternating directions need seven more of the size of H for an inverse, or keep one for each pull.
    """
    n, k = sum(t.n for t in group), group[0].k
    rows = min(n, max(1, SLAB // k)) if on_gpu else n
    inverses = _INVERSES * 4 * k * k if pruner.mask == "alternation" else 0
    return 4 * k * k + 32 * rows * k + inverses


def _seconds(
    blocks: Sequence[tuple[Work, int]], solver: RTN | GPTQ | Pruner, load: _Load, device: torch.device, nbytes: int
) -> float:
    """All blocks, the start and the end; `blocks` are those of each kind, and how many."""
    assert isinstance(solver, GPTQ), "the time of nothing else is known"
    rate = matmul_rate(device, torch.float16 if device.type == "cuda" else torch.float32)
    takes = _TAKES[device.type]
    every = 0.0
    for work, count in blocks:
        floor = least_seconds(work, solver, rate, device)
        block = sum(takes[part] * seconds / load.share(part) for part, seconds in floor.items())
        every += count * (block + sum(_beside_products(group, solver, device, load) for group in work.groups if group))
    return _START[device.type] + every + nbytes / _HASHED[device.type]


def _beside_products(group: Sequence[Target], solver: GPTQ, device: torch.device, load: _Load) -> float:
    """Seconds of the walks along the columns, and of the search for scales."""
    n, k = sum(t.n for t in group) // load.rows, group[0].k
    column = _COLUMN_US[device.type] * 1e-6
    moved = 0.0 if device.type == "cuda" else n * 128 * 4 / 20e9  # the block of columns behind each
    candidates = {"absmax": 1, "conditional": 76 * (1 + 128 / 8), "diagonal": 71}[solver.scales]
    walks = max(_slabs(n, k, device), load.walks) * (1 + solver.polish)
    corners = k * _CORNER_US[device.type] * 1e-6
    return n * k * candidates * _SEARCH_NS[device.type] * 1e-9 + k * walks * (column + moved) + corners


def _slabs(n: int, k: int, device: torch.device) -> int:
    """How often a group of this size is walked through, a slab of rows at a time."""
    return -(-n // max(1, SLAB // k)) if device.type == "cuda" else 1
