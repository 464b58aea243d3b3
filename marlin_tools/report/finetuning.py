"""What a training step on a model of true shapes takes, as a table for the terminal: what was measured, and the whole model."""

import json
from pathlib import Path

from marlin_tools.bench.finetuning import FinetuneBench, Measured
from marlin_tools.checkpoint.output import put
from marlin_tools.report.text import facts, table


def finetune_table(bench: FinetuneBench) -> str:
    """A row for the blocks that there were, and one for all that the model has."""
    asked = bench.settings
    text = f"{asked.batch} x {asked.seqlen} tokens a step, {asked.micro} windows at a time"
    again = ", activations computed twice" if asked.recompute else ""
    head = f"{bench.device}: {asked.shape}, student {asked.student}, {text}{again}"
    rows = [_row(f"{bench.layers} of {bench.of} blocks", bench, bench.full)]
    if bench.layers < bench.of:
        rows.append(_row(f"{bench.of} blocks, reckoned", bench, bench.whole))
    names = ("", "ms a step", "tokens/s", "share of the peak", "GPU memory")
    told = [
        ("a block more", f"{1e3 * bench.block:.1f} ms"),
        ("without blocks", f"{1e3 * bench.bare.seconds:.1f} ms"),
        ("peak", f"{bench.rate / 1e12:.3g} TFLOP/s, a large product here and now"),
    ]
    return f"{head}\n\n{table(names, rows)}\n\n{facts(told)}"


def write(bench: FinetuneBench, folder: Path) -> Path:
    """All numbers as JSON."""
    file = folder / f"bench-finetune-{bench.settings.shape.rpartition('/')[2]}.json"
    put(file, json.dumps(bench.as_dict(), indent=1) + "\n")
    return file


def _row(name: str, bench: FinetuneBench, step: Measured) -> tuple[str, ...]:
    memory = "" if step.gpu_gb is None else f"{step.gpu_gb:.1f} GB"
    return name, f"{1e3 * step.seconds:.0f}", f"{bench.speed(step):.0f}", f"{bench.share(step):.0%}", memory
