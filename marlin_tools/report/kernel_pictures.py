"""The benchmarks as pictures: the paper's figures, and the curves of all kernels over the batch size.

Ideal lines follow the paper: bytes or arithmetic, whichever takes longer, at the rates that this GPU reached in the same run.
What belongs together has one colour: a contestant and its ideal, or the dense and the sparse kernel on one model.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from marlin_tools.bench.decoding import ModelBench
from marlin_tools.bench.figures import FigureData
from marlin_tools.bench.kernels import (
    BASELINE,
    DENSE,
    DEQUANTIZED,
    SPARSE,
    BenchSettings,
    Measurement,
    geometric_means,
    ideal_microseconds,
    timed_kernels,
)
from marlin_tools.report.figure import Axis, Line, chart
from marlin_tools.resources import kernels_dir

_BATCH = Axis("batch size", 2)
_HUES = {DENSE: 0, SPARSE: 1}
_IDEALS = {DENSE: ("ideal INT4", 4.125, 1.0), SPARSE: ("ideal INT4 2:4", 3.125, 0.5)}
"""Name, bits per weight with scales and positions, and the part of the arithmetic that is done."""


def draw(measured: FigureData) -> dict[str, str]:
    """SVG documents by what follows the name of the measurement in their file names."""
    if measured.figure is not None:
        return {"": FIGURES[measured.figure](measured)}
    # the share of the roofline is the least time that bytes or arithmetic need over the time taken
    return {
        "-speedup": _overview(measured, "speedup", "Speed-up over FP16", "speed-up"),
        "-roofline": _overview(measured, "roofline", "Share of the roofline", "least time / time taken"),
    }


def peak(measured: FigureData) -> str:
    """Speed-up over 16 bits on one large matrix, against the batch size."""
    some = measured.results[0]
    lines = []
    for kernel in (kernel for kernel in timed_kernels(measured.results) if kernel in _IDEALS):
        mine = sorted((float(r.m), r.speedup) for r in measured.results if r.kernel == kernel)
        ideal = _ideals(measured, some, kernel, [m for m, _ in mine])
        lines += [
            Line(kernel, mine, hue=_HUES[kernel]),
            Line(_IDEALS[kernel][0], ideal, hue=_HUES[kernel], ideal=True),
        ]
    title = f"Speed-up over FP16, {some.k} x {some.n}, group size 128"
    return chart(title, measured.gpu, _BATCH, Axis("speed-up"), lines)


def sustained(measured: FigureData) -> str:
    """The same on a GPU that is warm from work."""
    return peak(replace(measured, gpu=f"{measured.gpu}, kept busy before every measurement"))


def models(measured: FigureData) -> str:
    """Speed-up over all linears of a block, model by model, against the batch size; dotted for sparse weights."""
    results = measured.results
    lines = []
    for hue, model in enumerate(dict.fromkeys(r.model for r in results)):
        mine = [r for r in results if r.model == model]
        for kernel in (kernel for kernel in timed_kernels(results) if kernel in _IDEALS):
            points = []
            for m in sorted({r.m for r in mine}):
                base, taken = (sum(r.microseconds for r in mine if (r.kernel, r.m) == (name, m)) for name in (BASELINE, kernel))
                points += [(float(m), base / taken)] if taken else []
            name = f"{model.removeprefix('paper-')}, {kernel}"
            lines.append(Line(name, points, hue=hue, dotted=kernel == SPARSE))
    title = f"Speed-up over FP16, all linears of a block ({measured.rates.bandwidth / 1e12:.2f} TB/s)"
    return chart(title, measured.gpu, _BATCH, Axis("speed-up"), lines)


def roofline(measured: FigureData) -> str:
    """TFLOP/s against operations per byte, for square matrices of several sizes."""
    lines, intensities, rates = [], [], measured.rates
    for k, n in dict.fromkeys((r.k, r.n) for r in measured.results):
        points = []
        for r in (r for r in measured.results if (r.k, r.n, r.kernel) == (k, n, DENSE)):
            moved = r.terabytes_per_second * r.microseconds * 1e6
            points.append((2 * r.m * n * k / moved, 2 * r.m * n * k / r.microseconds / 1e6))
        intensities += [x for x, _ in points]
        lines.append(Line(f"{k} x {n}", points))
    ridge = rates.flops / rates.bandwidth
    corners = sorted({min(intensities), min(max(ridge, min(intensities)), max(intensities)), max(intensities)})
    roof = [(x, min(x * rates.bandwidth, rates.flops) / 1e12) for x in corners]
    lines.append(Line("roofline", roof, ideal=True))
    title = "INT4 products against the roofline"
    return chart(title, measured.gpu, Axis("operations per byte", 2), Axis("TFLOP/s", 10), lines)


FIGURES: dict[str, Callable[[FigureData], str]] = {"peak": peak, "sustained": sustained, "models": models, "roofline": roofline}


def _overview(measured: FigureData, what: str, title: str, axis: str) -> str:
    """Geometric means over the shapes of a column against the batch size, beside what others reach."""
    curves = {each: geometric_means(measured.results, each, what) for each in timed_kernels(measured.results)}
    lines = [
        Line(kernel, [(float(m), mean) for m, mean in curve.items()], hue=_HUES.get(kernel, 2))
        for kernel, curve in curves.items()
        if kernel != DEQUANTIZED  # the fallback, which is for many rows only
    ]
    peers = _peers(what, measured)
    return chart(f"{title}, geometric mean", _about(measured, peers), _BATCH, Axis(axis), lines + peers)


def model(bench: ModelBench) -> str:
    """Tokens per second over those in FP16, against the batch size, beside what is published."""
    batches = bench.settings.batches
    lines = [
        Line(scheme, [(float(batch), bench.speedup(scheme, batch)) for batch in batches])
        for scheme in bench.settings.schemes
        if scheme != "fp16"
    ]
    known = [(float(batch), published) for batch in batches if (published := bench.published(batch)) is not None]
    if known:
        lines.append(Line("int4, published (A10)", known, ideal=True))
    title = f"{bench.shape}: tokens per second over FP16"
    remark = f"{bench.device}, {bench.settings.tokens_in} tokens in, {bench.settings.tokens_out} out, CUDA graphs"
    return chart(title, remark, _BATCH, Axis("speed-up"), lines)


def _ideals(measured: FigureData, shape: Measurement, kernel: str, batches: Sequence[float]) -> list[tuple[float, float]]:
    """The speed-up by bytes and arithmetic alone."""
    _, bits, density = _IDEALS[kernel]

    def least(m: float, bits: float, density: float) -> float:
        return ideal_microseconds(int(m), shape.k, shape.n, bits, measured.rates, density=density)

    return [(m, least(m, 16, 1.0) / least(m, bits, density)) for m in batches]


def _about(measured: FigureData, peers: Sequence[Line]) -> str:
    settings = measured.settings
    group = "per column" if settings.group_size == -1 else f"group size {settings.group_size}"
    others = "; * measured on another one" if peers else ""
    return f"{', '.join(settings.models)}, {settings.dtype}, {group}; {measured.gpu}{others}"


def _peers(what: str, measured: FigureData) -> list[Line]:
    """Curves of other projects' kernels, as `kernels/peers.json` has them, where this run can be compared with them."""
    known: dict[str, Any] = json.loads((kernels_dir() / "peers.json").read_text(encoding="utf-8"))
    keys = ("models", "dtype", "group_size")
    same = all(getattr(measured.settings, key) == getattr(BenchSettings(), key) for key in keys)
    if not same or known["gpu"] not in measured.gpu:
        return []
    return [
        Line(f"{name} *", [(float(m), value) for m, value in curve.items()], hue=3 + i, dotted=True)
        for i, (name, curve) in enumerate(known[what].items())
    ]
