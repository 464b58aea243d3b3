"""What quantising a model of true shapes takes, as a table for the terminal: every part beside its floor."""

import json
from collections.abc import Iterator
from pathlib import Path

from marlin_tools.bench.quantizing import BESIDE, Part, QuantizeBench
from marlin_tools.checkpoint.output import put
from marlin_tools.report.text import facts, table


def quantize_table(bench: QuantizeBench) -> str:
    """Milliseconds a block, part by part, then the whole."""
    asked = bench.settings
    head = f"{bench.device}: {asked.shape}, preset {asked.preset}, {asked.samples} x {asked.seqlen} tokens"
    computed = [part for part in bench.parts if part.name not in BESIDE]
    rows = [_row(part, bench) for part in computed]
    floor = sum(part.least or 0.0 for part in computed) / bench.layers
    rows.append(
        ("a block in all", f"{1e3 * bench.block:.0f}", f"{1e3 * floor:.0f}", f"{bench.block / floor:.1f}" if floor else "")
    )
    rows += [
        (f"{part.name}, beside it", f"{1e3 * part.seconds / bench.layers:.0f}", "", "")
        for part in bench.parts
        if part.name in BESIDE
    ]
    return f"{head}\n\n{table(('part', 'ms a block', 'floor', 'times'), rows)}\n\n{facts(_facts(bench))}"


def write(bench: QuantizeBench, folder: Path) -> Path:
    """All numbers as JSON."""
    file = folder / f"bench-quantize-{bench.settings.shape.rpartition('/')[2]}.json"
    put(file, json.dumps(bench.as_dict(), indent=1) + "\n")
    return file


def _row(part: Part, bench: QuantizeBench) -> tuple[str, str, str, str]:
    own = f"{1e3 * part.seconds / bench.layers:.0f}"
    if not part.least:
        return part.name, own, "", ""
    return part.name, own, f"{1e3 * part.least / bench.layers:.0f}", f"{part.seconds / part.least:.1f}"


def _facts(bench: QuantizeBench) -> Iterator[tuple[str, str]]:
    yield "blocks", f"{bench.layers} of {bench.of}, {sum(bench.blocks):.1f} s in all, the first {bench.blocks[0]:.1f} s"
    yield "process", f"{bench.process:.1f} s from its start to the last byte on disk, without the making of the model"
    if bench.layers < bench.of:
        yield "whole model", f"{bench.whole:.0f} s at {bench.block:.2f} s a block"
    names = {"seconds": ("stage", "s"), "host_gb": ("host memory", "GB"), "gpu_gb": ("GPU memory", "GB")}
    for key, (name, unit) in names.items():
        if key in bench.real:
            foretold = f", forecast {bench.forecast[key]:.1f} {unit}" if key in bench.forecast else ""
            yield name, f"{bench.real[key]:.1f} {unit}{foretold}"
