"""Stage `inspect`: what a checkpoint is, dense or quantised, ours or another tool's, from headers, manifest and a few tensors.

`inspect` returns plain values for a program, `rows` turns them into a table for people.
"""

from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.families import known_family
from marlin_tools.formats.contents import Contents
from marlin_tools.quantized import ZERO, dtype_name, is_2_4
from marlin_tools.verification.engines import EngineVerdict, judge_checkpoint, served_as

SAMPLE = 32
"""Linears that are read to see how sparse they are; smaller models are read whole."""

WORST = 5


def inspect(model: str | Path | Checkpoint) -> dict[str, Any]:
    """The facts about a model, all of them JSON values."""
    source = Checkpoint.open(model)
    checkpoint = dequantized(source)
    contents = Contents(checkpoint)
    manifest = read_manifest(checkpoint.path) or {}
    config = checkpoint.config
    family = known_family(contents.checkpoint.config)
    head = family.head if family else "lm_head"
    return {
        "model": checkpoint.origin,
        "path": str(checkpoint.path),
        "family": config.get("model_type"),
        "supported": family is not None,
        "blocks": checkpoint.text_config.get("num_hidden_layers"),
        "positions": checkpoint.text_config.get("max_position_embeddings"),
        "dtype": dtype_name(checkpoint.dtype),
        "parameters": _parameters(contents),
        "bytes": _bytes(source, contents),
        "read_from": None if checkpoint is source else (source.quantization or {})["quant_method"],
        "format": contents.stored.format.name if contents.stored else None,
        "group_sizes": sorted(contents.group_sizes),
        "activations": contents.activations if contents.grids else None,
        "quantized": len(contents.grids),
        "quantized_weights": sum(grid.n * grid.k for grid in contents.grids.values()),
        "kept": [name for name in contents.plain if name != head] if contents.grids else [],
        "sparsity": _sparsity(contents, head),
        "made_from": manifest.get("model"),
        "teacher": manifest.get("teacher"),
        "calibration": manifest.get("calibration"),
        "solver": manifest.get("solver"),
        "warnings": manifest.get("warnings", []),
        "worst": _worst(manifest.get("linears", [])),
        "served_as": served_as(contents),
        "engines": [_verdict(verdict) for verdict in judge_checkpoint(contents)],
    }


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: what and how much."""
    sparsity, total = facts["sparsity"], facts["bytes"]["total"]
    parts = ", ".join(f"{kind} {size(count)}" for kind, count in facts["bytes"].items() if count and kind != "total")
    table = [
        ("model", facts["model"]),
        ("family", f"{facts['family']}, {facts['blocks']} blocks" + ("" if facts["supported"] else ", not supported")),
        ("parameters", f"{facts['parameters'] / 1e6:,.1f} M, {facts['dtype']}"),
        ("size", f"{size(total)}: {parts}"),
        ("format", facts["format"] or (f"{facts['read_from']}, read as {facts['dtype']}" if facts["read_from"] else "dense")),
    ]
    if facts["quantized"]:
        groups = ", ".join("per column" if size == -1 else str(size) for size in facts["group_sizes"])
        table += [("activations", "FP8, e4m3 with a scale for each token")] if facts["activations"] == "fp8" else []
        table += [("group size", groups), ("linears", f"{facts['quantized']} quantised, {len(facts['kept'])} kept")]
    if sparsity:
        some = f"2:4 in {sparsity['sparse']} of {sparsity['read']} linears" if sparsity["sparse"] else "not 2:4"
        pattern = "2:4" if sparsity["2:4"] else some
        read = "exact" if sparsity["exact"] else f"{sparsity['read']} of {sparsity['linears']} linears sampled"
        table.append(("sparsity", f"{pattern}, {sparsity['zeros']:.1%} zeros ({read})"))
    if tokens := facts["calibration"]:
        what = "training text" if facts["teacher"] else "calibration"
        table.append((what, f"{tokens['source']}, {tokens['sequences']} sequences, {tokens['tokens']} tokens"))
    if solver := facts["solver"]:
        table.append(("solver", ", ".join(f"{key} {value}" for key, value in solver.items())))
    table += [("warning", warning) for warning in facts["warnings"]]
    table += [("worst", f"{entry['name']}: {entry['error']:.2%} of the {entry['of']} lost") for entry in facts["worst"]]
    table += [(f"{engine['engine']} {engine['version']}", engine["verdict"]) for engine in facts["engines"]]
    return table


def _parameters(contents: Contents) -> int:
    """Weights as the model counts them: a quantised linear has N x K."""
    taken = contents.stored.tensors if contents.stored else frozenset()
    others = (contents.checkpoint.shape(name) for name in contents.checkpoint.names() if name not in taken)
    return sum(grid.n * grid.k for grid in contents.grids.values()) + sum(map(prod, others))


def _bytes(source: Checkpoint, contents: Contents) -> dict[str, int]:
    """What is stored, by kind; experts are linears, however many lie in one tensor."""
    taken = contents.stored.tensors if contents.stored else frozenset()
    sizes = {"quantized linears": 0, "other linears": 0, "embeddings and norms": 0}
    for name in source.names():
        linear = ".experts." in name or name.partition(".weight")[0] in contents.plain
        plain = "other linears" if linear else "embeddings and norms"
        sizes["quantized linears" if name in taken else plain] += source.stored(name).nbytes
    return {**sizes, "total": source.nbytes}


def _sparsity(contents: Contents, head: str) -> dict[str, Any] | None:
    """Zeros, and in how many linears every four neighbouring inputs have two: of all, or of some if there are many."""
    whole = [name for name, shape in contents.plain.items() if name != head and 0 not in shape]  # no weights, no pattern
    names = list(contents.grids) or whole
    read = names if len(names) <= SAMPLE else [names[i * len(names) // SAMPLE] for i in range(SAMPLE)]
    if not read:
        return None
    zeros = total = sparse = 0
    for name in read:
        zero = _zeros(contents, name)
        zeros, total = zeros + int(zero.sum()), total + zero.numel()
        sparse += is_2_4(~zero)
    model = contents.checkpoint
    fused = [name for name in model.names() if ".experts." in name and len(model.shape(name)) == 3]  # they are not read
    count = len(names) + len(fused)
    found = {"2:4": sparse == len(read) and not fused, "sparse": sparse, "zeros": zeros / total}
    return found | {"read": len(read), "linears": count, "exact": len(read) == count}


def _zeros(contents: Contents, name: str) -> Tensor:
    """Where the weight [N, K] of a linear is zero."""
    if contents.stored is not None and name in contents.grids:
        return contents.stored.read(name).codes == ZERO
    return contents.checkpoint.read(f"{name}.weight") == 0


def _worst(linears: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The linears that lost most of their output, or where no calibration measured that, most of their weight."""
    for what in ("output", "weight"):
        known = [entry for entry in linears if entry.get(f"{what}_error") is not None]
        if known:
            known.sort(key=lambda entry: -entry[f"{what}_error"])
            return [{"name": entry["name"], "error": entry[f"{what}_error"], "of": what} for entry in known[:WORST]]
    return []


def _verdict(verdict: EngineVerdict) -> dict[str, Any]:
    return {
        "engine": verdict.engine,
        "version": verdict.version,
        "loads": verdict.loads,
        "tensor_parallel": list(verdict.sizes),
        "verdict": str(verdict),
    }


def size(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
