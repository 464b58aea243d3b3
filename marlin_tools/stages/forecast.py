"""What a run will take, from shapes alone, and how far off that was.

Work is counted in floating-point operations and divided by the rate that this machine shows for a matrix product at this
moment; the solver's column loop, which is bound by launches or by memory rather than by arithmetic, has one measured constant
per device type.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from marlin_tools.algorithms import GPTQ, RTN
from marlin_tools.checkpoint import Checkpoint
from marlin_tools.device import matmul_rate, peak_memory
from marlin_tools.errors import DeviceError, OutputError
from marlin_tools.stages.inventory import Inventory, Target
from marlin_tools.stream import CHUNK_TOKENS

_PROCESS_GB = {"cpu": 0.75, "cuda": 2.5}
"""Host memory of the process with its libraries loaded."""
_SEARCH_NS = {"cpu": 0.55, "cuda": 0.004}
"""Nanoseconds per weight and scale candidate."""
_COLUMN_US = {"cpu": 25.0, "cuda": 70.0}
"""Microseconds per column of the sweep and of each pass of coordinate descent, on top of the arithmetic."""
_ALLOCATOR = 1.2
"""What the allocator keeps beyond what is asked for; measured on a CPU run of 4.1 GB that took 4.8."""
_STREAM_SHARE = 0.55
"""Share of the matrix rate that forwards and Gram matrices reach."""


@dataclass(frozen=True)
class Forecast:
    """Peak memory, disk and time of a run, and what was assumed."""

    device: torch.device
    host_gb: float
    gpu_gb: float | None
    disk_gb: float
    seconds: float
    linears: int
    kept: int
    started: float = field(default_factory=time.perf_counter)

    @property
    def minutes(self) -> float:
        """Expected minutes."""
        return self.seconds / 60

    def lines(self) -> list[tuple[str, str]]:
        """What and how much, for people."""
        rows = [("linears", f"{self.linears} quantised, {self.kept} kept as they are"), ("device", str(self.device))]
        rows.append(("host memory", f"{self.host_gb:.1f} GB at the peak"))
        if self.gpu_gb is not None:
            rows.append(("GPU memory", f"{self.gpu_gb:.1f} GB at the peak"))
        rows += [
            ("disk", f"{self.disk_gb:.1f} GB" if self.disk_gb >= 1 else f"{self.disk_gb * 1000:.0f} MB"),
            ("time", f"{self.seconds:.0f} s" if self.seconds < 90 else f"{self.minutes:.1f} min"),
        ]
        return rows

    def check(self, out: Path) -> None:
        """Refuse what cannot end well."""
        parent = next(path for path in (out, *out.absolute().parents) if path.exists())
        free = shutil.disk_usage(parent).free / 1e9
        if free < self.disk_gb:
            raise OutputError(
                f"`{out}` needs {self.disk_gb:.1f} GB, {free:.1f} GB are free", hint="free some disk or choose another `-o DIR`"
            )
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
        expected = {"seconds": self.seconds, "host_gb": self.host_gb} | (
            {"gpu_gb": self.gpu_gb} if self.gpu_gb is not None else {}
        )
        return {
            "forecast": {key: round(value, 2) for key, value in expected.items()},
            "real": {key: round(value, 2) for key, value in real.items()},
        }


def in_words(times: Mapping[str, Mapping[str, float]]) -> str:
    """What `compare` found, in one line."""
    units = {"seconds": "{:.0f} s", "host_gb": "{:.1f} GB of host memory", "gpu_gb": "{:.1f} GB of GPU memory"}
    real, expected = times["real"], times["forecast"]
    return "took " + ", ".join(f"{units[key].format(real[key])} (forecast {expected[key]:.1f})" for key in expected)


def forecast_quantize(
    checkpoint: Checkpoint, inventory: Inventory, solver: RTN | GPTQ, tokens: int, longest: int, device: torch.device
) -> Forecast:
    """Count the work of one block and multiply. `tokens` is 0 when no data is needed."""
    groups = inventory.reads_same_input()
    element = 4 if device.type == "cpu" else 2
    hidden = int(checkpoint.config["hidden_size"])
    widest = max((group[0].k for group in groups if group), default=hidden)
    weights = sum(t.n * t.k for group in groups for t in group)
    rate = matmul_rate(device, torch.float32 if device.type == "cpu" else torch.float16)
    activations = tokens * (hidden + widest) * element * (2 if solver.drift or not solver.staged else 1)
    solving = max((_solver_bytes(group) for group in groups), default=0)
    chunk = min(max(CHUNK_TOKENS, longest), tokens) * (4 * widest + 4 * hidden) * element
    working = _ALLOCATOR * (activations + solving + chunk + weights * element) / 1e9
    per_block = _forward_seconds(groups, hidden, tokens, longest, solver, rate)
    per_block += sum(_solve_seconds(group, solver, rate, device) for group in groups)
    stored = sum(t.n * t.k for t in inventory.targets)
    disk = (checkpoint.nbytes - 2 * stored + stored * 0.52) / 1e9
    process = _PROCESS_GB[device.type]
    on_gpu = device.type == "cuda"
    return Forecast(
        device=device,
        host_gb=process + (2 * weights * 2 / 1e9 if on_gpu else working),
        gpu_gb=working if on_gpu else None,
        disk_gb=disk,
        seconds=1.0 + per_block * inventory.blocks + checkpoint.nbytes / 1e9,
        linears=len(inventory.targets),
        kept=len(inventory.kept),
    )


def _solver_bytes(group: list[Target]) -> int:
    """Float32 copies of weights, errors, gradients and targets, and a few K x K matrices, one of them in float64."""
    n, k = sum(t.n for t in group), group[0].k if group else 0
    return 4 * (8 * n * k + 6 * k * k)


def _forward_seconds(
    groups: list[list[Target]], hidden: int, tokens: int, longest: int, solver: RTN | GPTQ, rate: float
) -> float:
    """Forwards of one block and its Gram matrices; the original model runs alongside when drift is corrected."""
    weights = sum(target.n * target.k for group in groups for target in group)
    forward = 2 * weights * tokens + 4 * tokens * longest * hidden
    grams = sum(2 * group[0].k ** 2 * tokens for group in groups if group)
    forwards = 2 if solver.drift or not solver.staged else 1
    return (forward * forwards + grams * (2 if solver.drift else 1)) / (_STREAM_SHARE * rate)


def _solve_seconds(group: list[Target], solver: RTN | GPTQ, rate: float, device: torch.device) -> float:
    if not group or isinstance(solver, RTN):
        return 0.0
    n, k = sum(t.n for t in group), group[0].k
    passes = 1 + solver.polish
    candidates = {"absmax": 1, "conditional": 76 * (1 + 128 / 8), "diagonal": 71}[solver.scales]
    arithmetic = (n * k * k * (1 + 4 * solver.polish) + 2 * k**3) / (0.5 * rate)
    search = n * k * candidates * _SEARCH_NS[device.type] * 1e-9
    columns = k * passes * (_COLUMN_US[device.type] * 1e-6 + n * 128 * 4 / 20e9)
    return arithmetic + search + columns
