"""How long our kernels take on a model's linears, beside cuBLAS and torch's own INT4 kernel.

The method is that of `ops/timing.py`. Speed-ups depend on the baseline's luck with a shape; so a roofline fraction stands
beside each: the time that the bytes or the arithmetic need at the rates measured in the same run, over the time taken.

    bytes = K N (4 + 16/128) / 8 + 2 M K + 2 M N        flop = 2 M N K
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import exp, log
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.errors import DeviceError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.ops import dispatch, reference, timing, w4a16
from marlin_tools.ops.layout import TILE_K, TILE_N, PackedWeight
from marlin_tools.ops.variants import TILES, target_of
from marlin_tools.settings import Settings

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama2-7b": {"qkv": (4096, 12288), "o": (4096, 4096), "gate_up": (4096, 22016), "down": (11008, 4096)},
    "llama2-13b": {"qkv": (5120, 15360), "o": (5120, 5120), "gate_up": (5120, 27648), "down": (13824, 5120)},
    "llama2-70b": {"qkv": (8192, 10240), "o": (8192, 8192), "gate_up": (8192, 57344), "down": (28672, 8192)},
    "llama3-8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
}
"""(K, N) of each model's fused linears."""

PAPER_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "paper-llama7b": ((4096, 12288), (4096, 4096), (4096, 21504), (10752, 4096)),
    "paper-llama13b": ((5120, 15360), (5120, 5120), (5120, 27136), (13568, 5120)),
    "paper-llama33b": ((6656, 19968), (6656, 6656), (6656, 35328), (17664, 6656)),
    "paper-llama65b": ((8192, 24576), (8192, 8192), (8192, 43520), (21760, 8192)),
    "paper-falcon180b": ((14848, 75264), (74240, 14848)),
}
"""The layer lists of the original benchmark, with its rounding of the MLP widths, so that its figures can be remade."""

BASELINE = "torch"
DEQUANTIZED = "dequantize + cuBLAS"
TINYGEMM = "torch int4"


class BenchSettings(Settings):
    """What to measure: `models` are names of `SHAPES` or `PAPER_SHAPES`, or `peak`, the paper's 72k x 18k scaled to the GPU."""

    models: tuple[str, ...] = ("llama2-7b", "llama2-70b")
    rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
    dtype: str = Field(default="float16", pattern="^(float16|bfloat16)$")
    group_size: int = Field(default=128, description="128, or -1 for one scale per output")
    peers: bool = True
    device: str = "cuda"


@dataclass(frozen=True)
class Measurement:
    """One kernel on one shape. `spread` is half the distance between the quartiles, in microseconds."""

    model: str
    layer: str
    k: int
    n: int
    m: int
    kernel: str
    choice: str
    microseconds: float
    spread: float
    speedup: float
    roofline: float
    terabytes_per_second: float


@dataclass(frozen=True)
class Rates:
    """What this GPU does in this run: bytes read per second, and flop of a large matrix product."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Shape:
    """One linear of one model."""

    model: str
    layer: str
    k: int
    n: int


def bench_kernels(settings: BenchSettings, emit: Emit = silent) -> list[Measurement]:
    """Time every shape and number of rows; results are checked before they are timed."""
    device = _device(settings.device)
    rates = measure_rates(device)
    emit(Event("note", f"{rates.bandwidth / 1e12:.2f} TB/s read, {rates.flops / 1e12:.0f} TFLOP/s in a large product"))
    shapes = _shapes(settings.models, device)
    results: list[Measurement] = []
    for index, shape in enumerate(shapes):
        problem = _Problem.make(shape, settings, device)
        for m in settings.rows:
            results += problem.measure(m, rates, peers=settings.peers)
        emit(Event("progress", "kernels", index + 1, len(shapes), {"model": shape.model, "layer": shape.layer}))
    return results


def tune(settings: BenchSettings, emit: Emit = silent) -> Path:
    """Measure every tile on every shape and write the table that `ops.dispatch` reads on this machine."""
    device = _device(settings.device)
    target = target_of(device)
    shapes = list({(s.k, s.n): s for s in _shapes(settings.models, device)}.values())
    table = []
    for index, shape in enumerate(shapes):
        problem = _Problem.make(shape, settings, device)
        winners = [problem.fastest(m) for m in settings.rows]
        table.append(dispatch.Measured(shape.n, shape.k, settings.rows, tuple(winners)))
        emit(Event("progress", "tuning", index + 1, len(shapes), {"model": shape.model, "layer": shape.layer}))
    path = dispatch.tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dispatch.to_json(target, table), encoding="utf-8")
    dispatch.forget()
    w4a16.forget_plans()
    return path


def geometric_means(results: Sequence[Measurement], kernel: str) -> dict[int, float]:
    """Speed-up over the baseline per M, over all shapes."""
    logs: dict[int, list[float]] = {}
    for r in results:
        if r.kernel == kernel:
            logs.setdefault(r.m, []).append(log(r.speedup))
    return {m: exp(sum(values) / len(values)) for m, values in sorted(logs.items())}


def write_json(results: Sequence[Measurement], path: Path) -> None:
    """All numbers, with what they were measured on."""
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    path.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n", encoding="utf-8")


def measure_rates(device: torch.device) -> Rates:
    """Reading 4 GB, and an 8192-cubed product in float16."""
    big = torch.empty(1 << 30, dtype=torch.float32, device=device).normal_()
    a, b = (torch.randn((8192, 8192), dtype=torch.float16, device=device) for _ in range(2))
    times = timing.time_calls({"read": [big.sum], "product": [lambda: a @ b]}, calls=4)
    return Rates(big.numel() * 4 / times["read"].microseconds * 1e6, 2 * 8192**3 / times["product"].microseconds * 1e6)


def _device(name: str) -> torch.device:
    if not torch.cuda.is_available():
        raise DeviceError("kernels are timed on a GPU, and torch finds none", hint="`marlin-tools doctor` says why")
    return torch.device("cuda", torch.device(name).index or 0)


def _shapes(models: Sequence[str], device: torch.device) -> list[Shape]:
    found: list[Shape] = []
    for model in models:
        if model == "peak":  # the paper: 256 outputs per multiprocessor, and four times as many inputs
            n = 256 * torch.cuda.get_device_properties(device).multi_processor_count
            found.append(Shape(model, "peak", 4 * n, n))
        elif model in PAPER_SHAPES:
            found += [Shape(model, f"{k}x{n}", k, n) for k, n in PAPER_SHAPES[model]]
        elif model in SHAPES:
            found += [Shape(model, layer, k, n) for layer, (k, n) in SHAPES[model].items()]
        else:
            known = ", ".join([*SHAPES, *PAPER_SHAPES, "peak"])
            raise DeviceError(f"no shapes are known for `{model}`", hint=f"known: {known}")
    return found


@dataclass(frozen=True)
class _Problem:
    """One linear with as many copies of its weight as pass the L2 cache."""

    shape: Shape
    packed: list[PackedWeight]
    dense: list[Tensor]
    peer: list[tuple[Tensor, Tensor]]

    @staticmethod
    def make(shape: Shape, settings: BenchSettings, device: torch.device) -> "_Problem":
        dtype = getattr(torch, settings.dtype)
        copies = timing.copies_past_l2(device, shape.k * shape.n // 2)
        packed = [_random_weight(shape, settings.group_size, device) for _ in range(copies)]
        peer = [_tinygemm_weight(shape, device) for _ in packed] if settings.peers else []
        return _Problem(shape, packed, [w4a16.dequantize(p, dtype) for p in packed], peer)

    def inputs(self, m: int) -> list[Tensor]:
        """Distinct activations for every copy."""
        like = self.dense[0]
        return [torch.randn((m, self.shape.k), dtype=like.dtype, device=like.device) for _ in self.packed]

    def measure(self, m: int, rates: Rates, *, peers: bool) -> Iterator[Measurement]:
        """The baseline, ours, and the rivals, in turn."""
        xs = self.inputs(m)
        choice = dispatch.choose(target_of(xs[0].device), m, self.shape.n, self.shape.k)
        self._check(xs[0], choice)
        contestants: dict[str, list[Callable[[], object]]] = {
            BASELINE: [partial(_multiply, x, w) for x, w in zip(xs, self.dense, strict=True)],
            "ours": [partial(w4a16.linear, x, p) for x, p in zip(xs, self.packed, strict=True)],
        }
        if m >= 64:
            contestants[DEQUANTIZED] = self._calls(dispatch.CUBLAS, xs)
        if peers and m <= 256:
            halves = [x.to(torch.bfloat16) for x in xs]
            multiply = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001
            contestants[TINYGEMM] = [partial(multiply, x, w, TILE_K, s) for x, (w, s) in zip(halves, self.peer, strict=True)]
        times = timing.time_calls(contestants, calls=48 if m <= 512 else 8)
        for kernel, taken in times.items():
            yield self._result(m, kernel, choice if kernel == "ours" else "", taken, times[BASELINE], rates)

    def fastest(self, m: int) -> str:
        """The best choice for so many rows."""
        xs = self.inputs(m)
        sensible = [
            name
            for name in dispatch.choices_on(target_of(xs[0].device))
            if name in TILES and TILES[name].tokens < 4 * max(8, m) and m <= 16 * TILES[name].tokens
        ]
        if m >= 64:
            sensible.append(dispatch.CUBLAS)
        times = timing.time_calls({choice: self._calls(choice, xs) for choice in sensible}, calls=48 if m <= 512 else 8)
        return min(times, key=lambda choice: times[choice].microseconds)

    def _calls(self, choice: str, xs: list[Tensor]) -> list[Callable[[], object]]:
        return [partial(w4a16.multiply_with, choice, x, p) for x, p in zip(xs, self.packed, strict=True)]

    def _check(self, x: Tensor, choice: str) -> None:
        """Some outputs of the choice that will be timed, against float64."""
        packed, tiles = self.packed[0], min(8, self.packed[0].codes.shape[0])
        part = PackedWeight(packed.codes[:tiles], packed.scales[:tiles], tiles * TILE_N)
        exact = reference.exact(x, part)
        error = (w4a16.linear(x, packed)[:, : tiles * TILE_N] - exact).norm() / exact.norm()
        if not error < 4 * torch.finfo(x.dtype).eps:
            raise DeviceError(f"`{choice}` is wrong on {self.shape} with {x.shape[0]} rows: relative error {error:.2g}")

    def _result(
        self, m: int, kernel: str, choice: str, taken: timing.Timing, baseline: timing.Timing, rates: Rates
    ) -> Measurement:
        k, n = self.shape.k, self.shape.n
        scales = self.packed[0].scales.shape[1]
        weight = 2 * k * n if kernel == BASELINE else k * n // 2 + 2 * scales * n
        moved = weight + 2 * m * (k + n)
        floor = max(moved / rates.bandwidth, 2 * m * n * k / rates.flops) * 1e6
        t = taken.microseconds
        speedup = baseline.microseconds / t
        return Measurement(
            self.shape.model, self.shape.layer, k, n, m, kernel, choice, t, taken.spread, speedup, floor / t, moved / t / 1e6
        )


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def _random_weight(shape: Shape, group_size: int, device: torch.device) -> PackedWeight:
    """Any bits are codes; scales as those of a quantised normal weight: zeros would run faster than real weights do."""
    tiles, groups = shape.n // TILE_N, shape.k // TILE_K
    codes = torch.randint(-(2**31), 2**31 - 1, (tiles, groups, 1024), dtype=torch.int32, device=device)
    scales = torch.randn((tiles, groups if group_size == TILE_K else 1, TILE_N), device=device).abs() * 0.002 + 0.004
    return PackedWeight(codes, scales.to(torch.float16), shape.n)


def _tinygemm_weight(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes in the layout of torch's INT4 kernel (bfloat16 only), with scales and zero points per group."""
    codes = torch.randint(0, 255, (shape.n, shape.k // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)  # noqa: SLF001
    scales = torch.randn((shape.k // TILE_K, shape.n, 2), dtype=torch.bfloat16, device=device) * 0.002
    return packed, scales
