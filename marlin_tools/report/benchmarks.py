"""What the benchmarks measured: tables for the terminal, and the files behind them. `kernel_pictures.py` draws pictures."""

import json
from collections.abc import Iterator
from pathlib import Path

from marlin_tools.bench.decoding import PUBLISHED, ModelBench
from marlin_tools.bench.figures import FigureData
from marlin_tools.bench.finetuning import FinetuneBench, Measured
from marlin_tools.bench.kernels import BASELINE, Measurement, geometric_means, timed_kernels
from marlin_tools.bench.quantizing import BESIDE, Part, QuantizeBench
from marlin_tools.checkpoint.output import put
from marlin_tools.report import kernel_pictures as pictures
from marlin_tools.report.text import facts, table

Bench = FigureData | ModelBench | QuantizeBench | FinetuneBench


def write(measured: Bench, folder: Path) -> list[Path]:
    """The numbers as JSON, and the pictures that there are of them."""
    files = {f"{measured.name}.json": json.dumps(measured.as_dict(), indent=1) + "\n"}
    if isinstance(measured, FigureData):
        files |= {f"{measured.name}{suffix}.svg": svg for suffix, svg in pictures.draw(measured).items()}
    if isinstance(measured, ModelBench) and "fp16" in measured.settings.schemes and len(measured.settings.schemes) > 1:
        files[f"{measured.name}.svg"] = pictures.model(measured)
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


def quantize_table(bench: QuantizeBench) -> str:
    """Milliseconds a block, part by part, then the whole."""
    asked = bench.settings
    how = f"preset {asked.preset}" + (f", {asked.sparsity}" if asked.sparsity else "")
    head = f"{bench.device}: {asked.shape}, {how}, {asked.samples} x {asked.seqlen} tokens"
    computed = [part for part in bench.parts if part.name not in BESIDE]
    rows = [_part_row(part, bench) for part in computed]
    floor = sum(part.least or 0.0 for part in computed) / bench.layers
    rows.append(
        ("a block in all", f"{1e3 * bench.block:.0f}", f"{1e3 * floor:.0f}", f"{bench.block / floor:.1f}" if floor else "")
    )
    rows += [
        (f"{part.name}, beside it", f"{1e3 * part.seconds / bench.layers:.0f}", "", "")
        for part in bench.parts
        if part.name in BESIDE
    ]
    return f"{head}\n\n{table(('part', 'ms a block', 'floor', 'times'), rows)}\n\n{facts(_whole(bench))}"


def _part_row(part: Part, bench: QuantizeBench) -> tuple[str, str, str, str]:
    own = f"{1e3 * part.seconds / bench.layers:.0f}"
    if not part.least:
        return part.name, own, "", ""
    return part.name, own, f"{1e3 * part.least / bench.layers:.0f}", f"{part.seconds / part.least:.1f}"


def _whole(bench: QuantizeBench) -> Iterator[tuple[str, str]]:
    yield "blocks", f"{bench.layers} of {bench.of}, {sum(bench.blocks):.1f} s in all, the first {bench.blocks[0]:.1f} s"
    yield "process", f"{bench.process:.1f} s from its start to the last byte on disk, without the making of the model"
    if bench.layers < bench.of:
        yield "whole model", f"{bench.whole:.0f} s at {bench.block:.2f} s a block"
    names = {"seconds": ("stage", "s"), "host_gb": ("host memory", "GB"), "gpu_gb": ("GPU memory", "GB")}
    for key, (name, unit) in names.items():
        if key in bench.real:
            foretold = f", forecast {bench.forecast[key]:.1f} {unit}" if key in bench.forecast else ""
            yield name, f"{bench.real[key]:.1f} {unit}{foretold}"


def finetune_table(bench: FinetuneBench) -> str:
    """A row for the blocks that there were, and one for all that the model has."""
    asked = bench.settings
    text = f"{asked.batch} x {asked.seqlen} tokens a step, {asked.micro} windows at a time"
    again = ", activations computed twice" if asked.recompute else ""
    head = f"{bench.device}: {asked.shape}, student {asked.student}, {text}{again}"
    rows = [_step_row(f"{bench.layers} of {bench.of} blocks", bench, bench.full)]
    if bench.layers < bench.of:
        rows.append(_step_row(f"{bench.of} blocks, reckoned", bench, bench.whole))
    names = ("", "ms a step", "tokens/s", "share of the peak", "GPU memory")
    told = [
        ("a block more", f"{1e3 * bench.block:.1f} ms"),
        ("without blocks", f"{1e3 * bench.bare.seconds:.1f} ms"),
        ("peak", f"{bench.rate / 1e12:.3g} TFLOP/s, a large product here and now"),
    ]
    return f"{head}\n\n{table(names, rows)}\n\n{facts(told)}"


def _step_row(name: str, bench: FinetuneBench, step: Measured) -> tuple[str, ...]:
    memory = "" if step.gpu_gb is None else f"{step.gpu_gb:.1f} GB"
    return name, f"{1e3 * step.seconds:.0f}", f"{bench.speed(step):.0f}", f"{bench.share(step):.0%}", memory
