"""What the benchmarks measured: tables for the terminal, and the numbers behind them. `kernel_pictures.py` draws them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from marlin_tools.bench.decoding import PUBLISHED, ModelBench
from marlin_tools.bench.figures import FigureData
from marlin_tools.bench.kernels import BASELINE, Measurement, geometric_means, timed_kernels
from marlin_tools.checkpoint.output import put
from marlin_tools.report import kernel_pictures as pictures
from marlin_tools.report.text import table


def write(measured: FigureData, folder: Path) -> list[Path]:
    """The numbers as JSON and the pictures of them."""
    name = f"bench-{measured.figure or 'kernels'}"
    drawn = {f"{name}{suffix}.svg": svg for suffix, svg in pictures.draw(measured).items()}
    return _write({f"{name}.json": json.dumps(document(measured), indent=1) + "\n", **drawn}, folder)


def write_model(bench: ModelBench, folder: Path) -> list[Path]:
    """The numbers of a whole model as JSON, and the speed-up over the batch size as a picture."""
    files = {f"bench-{bench.shape}.json": json.dumps(model_document(bench), indent=1) + "\n"}
    if "fp16" in bench.settings.schemes and len(bench.settings.schemes) > 1:
        files[f"bench-{bench.shape}.svg"] = pictures.model(bench)
    return _write(files, folder)


def document(measured: FigureData) -> dict[str, Any]:
    """All numbers of the kernels, with what they were measured on."""
    about = {"gpu": measured.gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "rates": asdict(measured.rates)}
    return {
        "figure": measured.figure,
        **about,
        "settings": measured.settings.model_dump(),
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


def kernel_table(measured: FigureData) -> str:
    """Microseconds per layer and batch; in brackets the speed-up over 16 bits and the share of the roofline."""
    results = measured.results
    batches = sorted({r.m for r in results})
    cells = {(r.model, r.layer, r.k, r.n, r.kernel, r.m): r for r in results}
    rows = []
    for model, layer, k, n, kernel in dict.fromkeys((r.model, r.layer, r.k, r.n, r.kernel) for r in results):
        found = [cells.get((model, layer, k, n, kernel, m)) for m in batches]
        rows.append((f"{model} {layer}", f"{k} x {n}", kernel, *(_cell(r) for r in found)))
    for kernel in timed_kernels(results):
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
