"""The paper's speed figures on this GPU: which shapes and batch sizes each of them shows.

The paper fixes one clock for its sustained figure. Here the GPU is kept busy with large products before every measurement
instead, so that power and heat settle where a busy server has them; who wants a fixed clock locks it first
(`nvidia-smi -lgc`) and asks for `peak`.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from marlin_tools.bench import timing
from marlin_tools.bench.kernels import (
    PAPER_SHAPES,
    BenchSettings,
    Measurement,
    Rates,
    bench_kernels,
    check_models,
    host_costs,
    measure_rates,
)
from marlin_tools.distributed.device import describe_device
from marlin_tools.events import Emit, silent

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_WARM_UP_SECONDS, _SUSTAINED_SECONDS = 10, 3


@dataclass(frozen=True)
class Figure:
    """What it shows, and what is measured for it unless the user says otherwise."""

    shows: str
    models: tuple[str, ...]
    rows: tuple[int, ...] = _BATCHES
    busy: bool = False

    def settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The benchmark's settings: `asked` by the user, the figure's own for the rest."""
        return {"models": self.models, "rows": self.rows, "peers": False, **asked}


FIGURES = {
    "peak": Figure("speed-up over FP16 on one large matrix, with the ideal", ("peak",)),
    "sustained": Figure("the same on a GPU that was kept busy before", ("peak",), busy=True),
    "models": Figure("speed-up over FP16 for the linears of whole models", tuple(PAPER_SHAPES)),
    "roofline": Figure(
        "operations per second against operations per byte, for square matrices",
        tuple(f"{size}x{size}" for size in (4096, 8192, 16384, 32768)),
        tuple(2**power for power in range(15)),
    ),
}


@dataclass(frozen=True)
class FigureData:
    """What was measured, on what, at which rates, and what a call costs the host; `figure` is None for the plain benchmark."""

    figure: str | None
    gpu: str
    settings: BenchSettings
    rates: Rates
    host: dict[str, float]
    results: tuple[Measurement, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"bench-{self.figure or 'kernels'}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {"figure": self.figure, "gpu": self.gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
        results = [asdict(each) for each in self.results]
        more = {"rates": asdict(self.rates), "settings": self.settings.model_dump(), "host_microseconds": self.host}
        return own | more | {"results": results}


def measure(figure: str | None, settings: BenchSettings, emit: Emit = silent) -> FigureData:
    """Run the benchmark for a figure, or the plain one."""
    check_models(settings.models)
    device = timing.gpu(settings.device, "kernels are")
    rates = measure_rates(device)
    busy = figure is not None and FIGURES[figure].busy
    if busy:
        _keep_busy(device, _WARM_UP_SECONDS)
    before = partial(_keep_busy, device, _SUSTAINED_SECONDS) if busy else lambda: None
    results = bench_kernels(settings, emit, rates, before)
    return FigureData(figure, describe_device(device), settings, rates, host_costs(device), tuple(results))


def _keep_busy(device: torch.device, seconds: float) -> None:
    """Large products without a pause."""
    a, b = (torch.randn((8192, 8192), dtype=torch.float16, device=device) for _ in range(2))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(50):
            torch.mm(a, b)
        torch.cuda.synchronize(device)
