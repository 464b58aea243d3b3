"""How long our kernels take on a model's linears, beside cuBLAS and torch's own INT4 kernel.

The method is that of `bench/timing.py`. Speed-ups depend on the baseline's luck with a shape; so a roofline fraction stands
beside each: the time that the bytes or the arithmetic need at the rates measured in the same run, over the time taken.

    bytes = K N (4 + 16/128) / 8 + 2 M K + 2 M N        flop = 2 M N K

and for 2:4-sparse weights 3 bits instead of 4, and half of the arithmetic; half of it, too, with activations in FP8, whose
rounding is timed with the product.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, exp, log
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from marlin_tools.bench import timing
from marlin_tools.checkpoint.output import folder, put
from marlin_tools.distributed.device import DeviceName
from marlin_tools.errors import DeviceError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.ops.linear import dispatch, fp8_reference, reference, sparse_dispatch, sparse_reference, w4a8, w4a16, w24a16
from marlin_tools.ops.linear.fp8_tiles import FP8_GROUP_SIZES, FP8_TILES
from marlin_tools.ops.linear.layout import GROUP_SIZES, SPARSE_GROUP_SIZES, TILE_K, TILE_N, PackedWeight, exponent_of
from marlin_tools.ops.linear.sparse_layout import PackedSparse, random_sparse
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES
from marlin_tools.ops.linear.tiles import TILES
from marlin_tools.ops.runtime.cubin_cache import default_dir
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

PEAK = "peak"
BASELINE = "torch"
DENSE = "ours"
SPARSE = "ours 2:4"
FP8 = "ours fp8"
DEQUANTIZED = "dequantize + cuBLAS"
TINYGEMM = "torch int4"


class BenchSettings(Settings):
    """What to measure: `models` are names of `SHAPES` or `PAPER_SHAPES`, sizes such as `4096x12288` (K x N), or `peak`, the
    paper's 72k x 18k scaled to the GPU.
    """

    models: tuple[str, ...] = Field(default=("llama2-7b", "llama2-70b"), min_length=1)
    rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    dtype: Literal["float16", "bfloat16"] = "float16"
    group_size: Literal[128, 64, 32, -1] = Field(default=128, description="128, 64, 32, or -1 for one scale per output")
    peers: bool = True
    device: DeviceName = "cuda"


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


def bench_kernels(
    settings: BenchSettings, emit: Emit = silent, rates: Rates | None = None, before: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Time every shape and number of rows; results are checked before they are timed. `before` each, something may be done."""
    check_models(settings.models)
    device = timing.gpu(settings.device, "kernels are")
    rates = rates or measure_rates(device)
    emit(Event("note", f"{rates.bandwidth / 1e12:.2f} TB/s read, {rates.flops / 1e12:.0f} TFLOP/s in a large product"))
    shapes = _shapes(settings.models, device)
    results: list[Measurement] = []
    for index, shape in enumerate(shapes):
        problem = _Problem.make(shape, settings, rates)
        for m in settings.rows:
            before()
            results += problem.measure(m, peers=settings.peers)
        emit(Event("progress", "kernels", index + 1, len(shapes), {"model": shape.model, "layer": shape.layer}))
    return results


def tune(settings: BenchSettings, emit: Emit = silent) -> Path:
    """Measure every tile on every shape and write the tables that `ops.dispatch` reads on this machine; the folder."""
    check_models(settings.models)
    device = timing.gpu(settings.device, "kernels are")
    place = folder(default_dir(), hint="point `MARLIN_TOOLS_CACHE` at a folder of your own")
    gpu = dispatch.gpu_of(device)
    shapes = list({(s.k, s.n): s for s in _shapes(settings.models, device)}.values())
    rates = measure_rates(device)
    tables: dict[str, list[dispatch.TableRow]] = {kind.name: [] for kind in _KINDS}
    for index, shape in enumerate(shapes):
        problem = _Problem.make(shape, settings, rates)
        for kind in (kind for kind in _KINDS if kind.name in problem.ours):
            winners = [problem.fastest(kind, m) for m in settings.rows]
            tables[kind.name].append(dispatch.TableRow(shape.n, shape.k, settings.rows, tuple(winners)))
        emit(Event("progress", "tuning", index + 1, len(shapes), {"model": shape.model, "layer": shape.layer}))
    for kind in _KINDS:
        put(kind.tables.tuned_path(), kind.tables.tuned_with(gpu, tables[kind.name]))
        kind.tables.forget()
    w4a16.forget_plans()
    w24a16.forget_plans()
    return place


def geometric_means(results: Sequence[Measurement], kernel: str, of: str = "speedup") -> dict[int, float]:
    """Of the speed-up over the baseline, or of the roofline's share, per M, over all shapes."""
    logs: dict[int, list[float]] = {}
    for r in results:
        if r.kernel == kernel:
            logs.setdefault(r.m, []).append(log(getattr(r, of)))
    return {m: exp(sum(values) / len(values)) for m, values in sorted(logs.items())}


def timed_kernels(results: Iterable[Measurement]) -> list[str]:
    """Everything that was timed beside the baseline."""
    return [kernel for kernel in dict.fromkeys(r.kernel for r in results) if kernel != BASELINE]


def measure_rates(device: torch.device) -> Rates:
    """Reading 4 GB, and an 8192-cubed product in float16."""
    big = torch.empty(1 << 30, dtype=torch.float32, device=device).normal_()
    a, b = (torch.randn((8192, 8192), dtype=torch.float16, device=device) for _ in range(2))
    times = timing.time_calls({"read": [big.sum], "product": [lambda: a @ b]}, calls=4)
    return Rates(big.numel() * 4 / times["read"].microseconds * 1e6, 2 * 8192**3 / times["product"].microseconds * 1e6)


def host_costs(device: torch.device) -> dict[str, float]:
    """Microseconds that one eager call costs the host, which a CUDA graph saves: our dense operator, torch's own product."""
    size = 4096
    packed = random_weight(size, size, device)
    x, weight = (torch.randn((rows, size), dtype=torch.float16, device=device) for rows in (1, size))
    calls = {DENSE: partial(w4a16.linear, x, packed), BASELINE: partial(torch.mm, x, weight)}
    return {name: timing.host_microseconds(call) for name, call in calls.items()}


def ideal_microseconds(m: int, k: int, n: int, bits: float, rates: Rates, *, density: float = 1.0) -> float:
    """The least a product can take: its bytes at `bits` per weight, or its arithmetic, of which a sparse one has a part."""
    moved = k * n * bits / 8 + 2 * m * (k + n)
    return max(moved / rates.bandwidth, 2 * m * n * k * density / rates.flops) * 1e6


def check_models(models: Sequence[str]) -> None:
    """Refuse what no shapes are known for; that needs no GPU."""
    for model in models:
        if model != PEAK:
            _layers(model)


def _shapes(models: Sequence[str], device: torch.device) -> list[Shape]:
    found: list[Shape] = []
    for model in models:
        if model == PEAK:  # the paper: 256 outputs per multiprocessor, and four times as many inputs
            n = 256 * torch.cuda.get_device_properties(device).multi_processor_count
            found.append(Shape(model, "peak", 4 * n, n))
        else:
            found += [Shape(model, layer, k, n) for layer, (k, n) in _layers(model).items()]
    return found


def _layers(model: str) -> dict[str, tuple[int, int]]:
    """(K, N) of the linears of a model, or of a size, by name."""
    if model in PAPER_SHAPES:
        return {f"{k}x{n}": (k, n) for k, n in PAPER_SHAPES[model]}
    if model in SHAPES:
        return SHAPES[model]
    if size := re.fullmatch(r"(\d+)x(\d+)", model):
        k, n = map(int, size.groups())
        if not k or not n or k % TILE_K or n % TILE_N:
            hint = f"K x N, K a multiple of {TILE_K} and N of {TILE_N}"
            raise DeviceError(f"`{model}` is no shape of the kernels", hint=hint)
        return {"": (k, n)}
    known = ", ".join([*SHAPES, *PAPER_SHAPES, PEAK])
    raise DeviceError(f"no shapes are known for `{model}`", hint=f"known: {known}, or a size such as 4096x12288 (K x N)")


@dataclass(frozen=True)
class _Kind:
    """One kind of weight that our kernels multiply with. `bits` are those of a weight without its scale."""

    name: str
    bits: float
    density: float
    tables: dispatch.Tables
    tiles: Mapping[str, Any]
    groups: tuple[int, ...]
    random: Callable[[int, int, torch.device, int], Any]
    linear: Callable[[Tensor, Any], Tensor]
    multiply_with: Callable[[str, Tensor, Any], Tensor]
    exact: Callable[[Tensor, Any], Tensor]

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens a tile of each choice has."""
        return {name: tile.tokens for name, tile in self.tiles.items()}

    def exists_on(self, gpu: str) -> bool:
        """Whether a GPU has the instructions."""
        return any(name in self.tokens for name in self.tables.choices_on(gpu))

    def sensible(self, gpu: str, m: int, k: int) -> list[str]:
        """What could be fastest for so many rows of so many inputs."""
        tiles = [name for name in self.tables.choices_on(gpu) if name in self.tokens and self.tables.has_room(gpu, name, m, k)]
        if self.name == FP8:  # for many rows only, and nothing to fall back to: cuBLAS would not round
            return tiles
        most = max(self.tokens[name] for name in tiles)
        fit = [t for t in tiles if self.tokens[t] < 4 * max(8, m) and (m <= 16 * self.tokens[t] or 2 * self.tokens[t] >= most)]
        return [*fit, dispatch.CUBLAS] if m >= 64 else fit

    def check(self, x: Tensor, packed: Any, choice: str, shape: Shape) -> None:
        """Some outputs of the choice that will be timed, against float64."""
        tiles = min(8, packed.codes.shape[0])
        part = replace(packed, codes=packed.codes[:tiles], scales=packed.scales[:tiles], out_features=tiles * TILE_N)
        exact = self.exact(x, part)
        error = (self.linear(x, packed)[:, : tiles * TILE_N] - exact).norm() / exact.norm()
        if not error < 4 * torch.finfo(x.dtype).eps:
            raise DeviceError(f"`{choice}` is wrong on {shape} with {x.shape[0]} rows: relative error {error:.2g}")


@dataclass(frozen=True)
class _Problem:
    """One linear with as many copies of its weight as pass the L2 cache; ours by the name of their kind."""

    shape: Shape
    ours: dict[str, list[Any]]
    dense: list[Tensor]
    peer: list[tuple[Tensor, Tensor]]
    scales: int  # per output
    rates: Rates

    @staticmethod
    def make(shape: Shape, settings: BenchSettings, rates: Rates) -> "_Problem":
        device, dtype = timing.gpu(settings.device, "kernels are"), getattr(torch, settings.dtype)
        copies = range(timing.copies_past_l2(device, shape.k * shape.n * 3 // 8))
        group = settings.group_size
        kinds = [kind for kind in _KINDS if group in {*kind.groups, -1} and kind.exists_on(dispatch.gpu_of(device))]
        ours = {kind.name: [kind.random(shape.n, shape.k, device, group) for _ in copies] for kind in kinds}
        peer = [_tinygemm_weight(shape, device) for _ in copies] if settings.peers else []
        scales = 1 if group == -1 else shape.k // group
        return _Problem(shape, ours, [w4a16.dequantize(p, dtype) for p in ours[DENSE]], peer, scales, rates)

    def inputs(self, m: int) -> list[Tensor]:
        """Distinct activations for every copy."""
        like = self.dense[0]
        return [torch.randn((m, self.shape.k), dtype=like.dtype, device=like.device) for _ in self.dense]

    def calls(self, m: int, milliseconds: float) -> int:
        """So many that cuBLAS needs about this time for them, but not more than 48: the rest only heats the GPU."""
        likely = ideal_microseconds(m, self.shape.k, self.shape.n, 16.0, self.rates)
        return min(48, ceil(milliseconds * 1e3 / likely))

    def measure(self, m: int, *, peers: bool) -> Iterator[Measurement]:
        """The baseline, ours, and the rivals, in turn."""
        xs = self.inputs(m)
        choices: dict[str, str] = {}
        contestants: dict[str, list[Callable[[], object]]] = {
            BASELINE: [partial(_multiply, x, w) for x, w in zip(xs, self.dense, strict=True)],
        }
        for kind in (kind for kind in _KINDS if kind.name in self.ours):
            weights = self.ours[kind.name]
            choices[kind.name] = kind.tables.choose(dispatch.gpu_of(xs[0].device), m, self.shape.n, self.shape.k)
            kind.check(xs[0], weights[0], choices[kind.name], self.shape)
            contestants[kind.name] = [partial(kind.linear, x, p) for x, p in zip(xs, weights, strict=True)]
        if peers and m >= 64:
            contestants[DEQUANTIZED] = self._calls(_KINDS[0], dispatch.CUBLAS, xs)
        if peers and m <= 256:
            halves = [x.to(torch.bfloat16) for x in xs]
            multiply = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001
            contestants[TINYGEMM] = [partial(multiply, x, w, TILE_K, s) for x, (w, s) in zip(halves, self.peer, strict=True)]
        times = timing.time_calls(contestants, calls=self.calls(m, 4.0))
        for kernel, taken in times.items():
            yield self._result(m, kernel, choices.get(kernel, ""), taken, times[BASELINE])

    def fastest(self, kind: _Kind, m: int) -> str:
        """The best choice for so many rows."""
        xs = self.inputs(m)
        sensible = kind.sensible(dispatch.gpu_of(xs[0].device), m, self.shape.k)
        contestants = {c: self._calls(kind, c, xs) for c in sensible}
        times = timing.time_calls(contestants, replays=6, calls=self.calls(m, 1.5))
        return min(times, key=lambda choice: times[choice].microseconds)

    def _calls(self, kind: _Kind, choice: str, xs: list[Tensor]) -> list[Callable[[], object]]:
        return [partial(kind.multiply_with, choice, x, p) for x, p in zip(xs, self.ours[kind.name], strict=True)]

    def _result(self, m: int, kernel: str, choice: str, taken: timing.Timing, baseline: timing.Timing) -> Measurement:
        k, n = self.shape.k, self.shape.n
        kind = next((kind for kind in _KINDS if kind.name == kernel), _KINDS[0])
        bits = 16.0 if kernel == BASELINE else kind.bits + 16 * self.scales / k
        moved = k * n * bits / 8 + 2 * m * (k + n)
        floor = ideal_microseconds(m, k, n, bits, self.rates, density=kind.density)
        t = taken.microseconds
        speedup = baseline.microseconds / t
        return Measurement(
            self.shape.model, self.shape.layer, k, n, m, kernel, choice, t, taken.spread, speedup, floor / t, moved / t / 1e6
        )


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def random_weight(n: int, k: int, device: torch.device, group_size: int = TILE_K) -> PackedWeight:
    """Any bits are codes; scales as those of a quantised normal weight: zeros would run faster than real weights do."""
    tiles, groups = -(-n // TILE_N), k // TILE_K
    codes = torch.randint(-(2**31), 2**31 - 1, (tiles, groups, 1024), dtype=torch.int32, device=device)
    scales = torch.randn((tiles, 1 if group_size == -1 else k // group_size, TILE_N), device=device).abs() * 0.002 + 0.004
    return PackedWeight(codes, scales.to(torch.float16), n, exponent_of(scales))


def _random_sparse(n: int, k: int, device: torch.device, group_size: int) -> PackedSparse:
    return random_sparse(n, k, device, per_column=group_size == -1)


def _tinygemm_weight(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes in the layout of torch's INT4 kernel (bfloat16 only), with scales and zero points per group."""
    codes = torch.randint(0, 255, (shape.n, shape.k // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)  # noqa: SLF001
    scales = torch.randn((shape.k // TILE_K, shape.n, 2), dtype=torch.bfloat16, device=device) * 0.002
    return packed, scales


_DENSE = w4a16.linear, w4a16.multiply_with, reference.exact
_SPARSE = w24a16.sparse_linear, w24a16.multiply_with, sparse_reference.exact
_FP8 = w4a8.fp8_linear, w4a8.multiply_with, fp8_reference.exact
_KINDS = (
    _Kind(DENSE, 4.0, 1.0, dispatch.DENSE, TILES, GROUP_SIZES, random_weight, *_DENSE),
    _Kind(SPARSE, 3.0, 0.5, sparse_dispatch.SPARSE, SPARSE_TILES, SPARSE_GROUP_SIZES, _random_sparse, *_SPARSE),
    _Kind(FP8, 4.0, 0.5, w4a8.FP8, FP8_TILES, FP8_GROUP_SIZES, random_weight, *_FP8),
)
