"""What the benchmarks measured: tables for the terminal, the paper's figures, and the numbers behind both.

Ideal lines follow the paper: bytes or arithmetic, whichever takes longer, at the rates that this GPU reached in the same run.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from marlin_tools.output import put
from marlin_tools.report.figure import Axis, Line, chart
from marlin_tools.report.text import table
from marlin_tools.stages.bench import BASELINE, Measurement, Rates, geometric_means, ideal_microseconds
from marlin_tools.stages.bench_figures import Measured
from marlin_tools.stages.bench_model import PUBLISHED, ModelBench

Draw = Callable[[Sequence[Measurement], Rates, str], str]


def write(measured: Measured, folder: Path) -> list[Path]:
    """The numbers as JSON and, if it is one of the paper's figures, the picture."""
    name = f"bench-{measured.figure or 'kernels'}"
    files = {f"{name}.json": json.dumps(document(measured), indent=1) + "\n"}
    if measured.figure is not None:
        files[f"{name}.svg"] = FIGURES[measured.figure](measured.results, measured.rates, measured.gpu)
    return _write(files, folder)


def write_model(bench: ModelBench, folder: Path) -> list[Path]:
    """The numbers of a whole model as JSON, and the speed-up over the batch size as a picture."""
    files = {f"bench-{bench.shape}.json": json.dumps(model_document(bench), indent=1) + "\n"}
    if "fp16" in bench.settings.schemes and len(bench.settings.schemes) > 1:
        files[f"bench-{bench.shape}.svg"] = model_figure(bench)
    return _write(files, folder)


def document(measured: Measured) -> dict[str, Any]:
    """All numbers of the kernels, with what they were measured on."""
    about = {"gpu": measured.gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "rates": asdict(measured.rates)}
    return {
        "figure": measured.figure,
        **about,
        "host_microseconds": measured.host,
        "results": [asdict(each) for each in measured.results],
    }


def model_document(bench: ModelBench) -> dict[str, Any]:
    """All numbers of a whole model."""
    about = {"shape": bench.shape, "gpu": bench.device, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**about, "settings": bench.settings.model_dump(), "results": [asdict(each) for each in bench.measurements]}


def _write(files: dict[str, str], folder: Path) -> list[Path]:
    for name, text in files.items():
        put(folder / name, text)
    return [folder / name for name in files]


def kernel_table(measured: Measured) -> str:
    """Microseconds per layer and batch; in brackets the speed-up over 16 bits and the share of the roofline."""
    results = measured.results
    batches = sorted({r.m for r in results})
    cells = {(r.model, r.layer, r.k, r.n, r.kernel, r.m): r for r in results}
    rows = []
    for model, layer, k, n, kernel in dict.fromkeys((r.model, r.layer, r.k, r.n, r.kernel) for r in results):
        found = [cells.get((model, layer, k, n, kernel, m)) for m in batches]
        rows.append((f"{model} {layer}", f"{k} x {n}", kernel, *(_cell(r) for r in found)))
    for kernel in _contestants(results):
        means = geometric_means(results, kernel)
        rows.append(("geometric mean", "", kernel, *(f"({means[m]:.2f})" if m in means else "" for m in batches)))
    rates = f"{measured.rates.bandwidth / 1e12:.2f} TB/s read, {measured.rates.flops / 1e12:.0f} TFLOP/s in a large product"
    host = ", ".join(f"{name} {cost:.1f}" for name, cost in measured.host.items())
    head = f"{measured.gpu}: {rates}\nhost, microseconds an eager call: {host}\n"
    head += f"microseconds (speed-up over {BASELINE} in 16 bits, share of the roofline)\n\n"
    return head + table(("layer", "K x N", "kernel", *(f"M = {m}" for m in batches)), rows)


def _cell(found: Measurement | None) -> str:
    if found is None:
        return ""
    return f"{found.microseconds:.1f} ({found.speedup:.2f}, {found.roofline:.2f})"


def model_table(bench: ModelBench) -> str:
    """Time per token, and what a block does besides its products, for every scheme and batch."""
    schemes, batches = bench.settings.schemes, bench.settings.batches
    columns = ["batch"]
    for scheme in schemes:
        columns += [f"{scheme}: prompt, ms", "ms/token", "tokens/s", "rest, us/block"]
    ratios = [scheme for scheme in schemes if scheme != "fp16"] if "fp16" in schemes else []
    columns += [f"{scheme} over fp16" for scheme in ratios]
    columns += ["published"] * (bench.shape in PUBLISHED)
    rows = []
    for batch in batches:
        cells = [str(batch)]
        for scheme in schemes:
            found = bench.find(scheme, batch)
            cells += [f"{found.first_token:.1f}", f"{found.step:.2f}", f"{found.tokens_per_second:.0f}", f"{found.rest:.1f}"]
        cells += [f"{bench.speedup(scheme, batch):.2f}" for scheme in ratios]
        if bench.shape in PUBLISHED:
            published = bench.published(batch)
            cells.append("" if published is None else f"{published:.2f}")
        rows.append(cells)
    source = f"\npublished: {PUBLISHED[bench.shape][0]}" if bench.shape in PUBLISHED else ""
    head = f"{bench.device}, {bench.settings.tokens_in} tokens in, {bench.settings.tokens_out} out"
    return f"{head}\n\n{table(columns, rows)}{source}"


def model_figure(bench: ModelBench) -> str:
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
    return chart(title, remark, Axis("batch size", 2), Axis("speed-up"), lines)


def peak(results: Sequence[Measurement], rates: Rates, gpu: str) -> str:
    """Speed-up over 16 bits on one large matrix, against the batch size."""
    some = results[0]
    lines = [Line(kernel, _by_batch(results, kernel)) for kernel in _contestants(results)]
    shape = some.k, some.n
    for name, bits, density in _ideals(results):
        points = [
            (float(m), ideal_microseconds(m, *shape, 16, rates) / ideal_microseconds(m, *shape, bits, rates, density=density))
            for m in sorted({r.m for r in results})
        ]
        lines.append(Line(name, points, ideal=True))
    title = f"Speed-up over FP16, {some.k} x {some.n}, group size 128"
    return chart(title, gpu, Axis("batch size", 2), Axis("speed-up"), lines)


def sustained(results: Sequence[Measurement], rates: Rates, gpu: str) -> str:
    """The same on a GPU that is warm from work."""
    return peak(results, rates, f"{gpu}, kept busy before every measurement")


def models(results: Sequence[Measurement], rates: Rates, gpu: str) -> str:
    """Speed-up over all linears of a block, model by model, against the batch size."""
    lines = []
    for kernel in _contestants(results):
        for model in dict.fromkeys(r.model for r in results):
            mine = [r for r in results if r.model == model]
            points = []
            for m in sorted({r.m for r in mine}):
                base, taken = (sum(r.microseconds for r in mine if (r.kernel, r.m) == (name, m)) for name in (BASELINE, kernel))
                points += [(float(m), base / taken)] if taken else []
            lines.append(Line(f"{model}, {kernel}", points))
    title = f"Speed-up over FP16, all linears of a block ({rates.bandwidth / 1e12:.2f} TB/s)"
    return chart(title, gpu, Axis("batch size", 2), Axis("speed-up"), lines)


def roofline(results: Sequence[Measurement], rates: Rates, gpu: str) -> str:
    """TFLOP/s against operations per byte, for square matrices of several sizes."""
    lines, intensities = [], []
    for k, n in dict.fromkeys((r.k, r.n) for r in results):
        points = []
        for r in (r for r in results if (r.k, r.n, r.kernel) == (k, n, "ours")):
            moved = r.terabytes_per_second * r.microseconds * 1e6
            points.append((2 * r.m * n * k / moved, 2 * r.m * n * k / r.microseconds / 1e6))
        intensities += [x for x, _ in points]
        lines.append(Line(f"{k} x {n}", points))
    ridge = rates.flops / rates.bandwidth
    corners = sorted({min(intensities), min(max(ridge, min(intensities)), max(intensities)), max(intensities)})
    roof = [(x, min(x * rates.bandwidth, rates.flops) / 1e12) for x in corners]
    lines.append(Line("roofline", roof, ideal=True))
    return chart("INT4 products against the roofline", gpu, Axis("operations per byte", 2), Axis("TFLOP/s", 10), lines)


FIGURES: dict[str, Draw] = {"peak": peak, "sustained": sustained, "models": models, "roofline": roofline}


def _contestants(results: Iterable[Measurement]) -> list[str]:
    return [kernel for kernel in dict.fromkeys(r.kernel for r in results) if kernel != BASELINE]


def _by_batch(results: Iterable[Measurement], kernel: str) -> list[tuple[float, float]]:
    return sorted((float(r.m), r.speedup) for r in results if r.kernel == kernel)


def _ideals(results: Iterable[Measurement]) -> list[tuple[str, float, float]]:
    """Name, bits per weight with scales and metadata, and the part of the arithmetic that is done."""
    sparse = any("2:4" in r.kernel for r in results)
    return [("ideal INT4", 4.125, 1.0), *([("ideal INT4 2:4", 3.125, 0.5)] if sparse else [])]
