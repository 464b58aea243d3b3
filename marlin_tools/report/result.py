"""Everything that is known of a model directory, in one value: what the page and the model card are written from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint, hub_name
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import ZERO
from marlin_tools.verification.inspect import inspect
from marlin_tools.verification.verify import Verification

SAMPLE = 32
"""Linears that are read for the histograms; smaller models are read whole."""

OCTAVE = 4
"""Bins of the histogram of scales per factor of two."""


@dataclass(frozen=True)
class Weights:
    """What the codes and scales look like.

    codes     share of weights by code 0..15
    scales    share of groups by magnitude: (lower bound of the bin, share), ascending, bins of 2^(1/OCTAVE)
    negative  share of scales below zero
    read      so many of `linears` linears were looked at
    """

    codes: tuple[float, ...]
    scales: tuple[tuple[float, float], ...]
    negative: float
    read: int
    linears: int


@dataclass(frozen=True)
class Result:
    """A model directory. `facts` is what `inspect` says, `evaluation` and `verification` are None where nobody has looked."""

    manifest: Mapping[str, Any]
    facts: Mapping[str, Any]
    weights: Weights | None
    evaluation: Evaluation | None
    verification: Verification | None
    recipe: str

    @property
    def original(self) -> Mapping[str, Any]:
        """Origin and fingerprint of the model that everything began with."""
        steps: list[Mapping[str, Any]] = [*self.manifest.get("history", ()), self.manifest]
        return steps[0].get("model") or {}

    @property
    def base(self) -> str:
        """What the original is called: a hub id, or the last part of a path, which says nothing of this machine."""
        origin, _ = hub_name(str(self.original.get("origin", "an unknown model")))
        return origin if self.base_is_public(origin) else Path(origin).name

    @staticmethod
    def base_is_public(origin: str) -> bool:
        """Whether a name can be looked up on the hub."""
        return origin.count("/") == 1 and not origin.startswith((".", "/", "~", "runs/")) and not Path(origin).is_dir()

    @property
    def scheme(self) -> str:
        """Bits and what shares a scale, for a headline."""
        if not self.quantized:
            return "2:4, 16 bits"
        sizes = self.facts["group_sizes"]
        groups = "per column" if sizes == [-1] else f"g{', '.join(map(str, sizes))}"
        sparsity = self.facts["sparsity"]
        return f"INT4 {groups}" + (" 2:4" if sparsity and sparsity["2:4"] else "")

    @property
    def method(self) -> str:
        """Preset and algorithm in a few words."""
        settings, solver = self.manifest.get("settings") or {}, self.manifest.get("solver") or {}
        before = [_before(each) for each in self.manifest.get("history", ())]
        if not self.quantized:
            return ", then ".join([*before, _before(self.manifest)])
        kind = {"gptq": "GPTQ", "rtn": "round to nearest"}.get(str(solver.get("kind")), str(solver.get("kind", "unknown")))
        how = kind if settings.get("algorithm") else f"{kind}, preset {settings.get('preset', 'unknown')}"
        return ", then ".join([*before, how])

    @property
    def finetuned(self) -> bool:
        """Whether the weights, and the norms with them, have been trained on the way."""
        return any(each.get("stage") == "finetune" for each in self.manifest.get("history", ()))

    @property
    def quantized(self) -> bool:
        """Whether the weights are codes and scales, rather than 16-bit numbers with zeros among them."""
        return self.facts["format"] is not None

    @property
    def bits(self) -> float:
        """Stored bits per quantised weight, scales included."""
        weights = sum(math.prod(entry["shape"]) for entry in self.manifest.get("linears", []))
        return 8 * self.facts["bytes"]["quantised linears"] / weights if weights else 0.0

    @property
    def before_bytes(self) -> int:
        """What the same model takes in 16 bits."""
        weights = sum(math.prod(entry["shape"]) for entry in self.manifest.get("linears", []))
        return int(self.facts["bytes"]["total"] - self.facts["bytes"]["quantised linears"] + 2 * weights)


def gather(directory: Path, verification: Verification | None, evaluation: Evaluation | None = None) -> Result:
    """Read a model directory; what is not there is None or empty. Its own evaluation goes before one that is handed over."""
    checkpoint = Checkpoint.open(directory)
    content = _json(directory / "evaluation.json")
    return Result(
        manifest=read_manifest(directory) or {},
        facts=inspect(checkpoint),
        weights=_weights(checkpoint) if checkpoint.quantization is not None else None,
        evaluation=Evaluation.restore(content) if content else evaluation,
        verification=verification,
        recipe=(directory / "recipe.yaml").read_text(encoding="utf-8") if (directory / "recipe.yaml").is_file() else "",
    )


def _before(entry: Mapping[str, Any]) -> str:
    """A stage that the weights have been through before they were quantised."""
    settings = entry.get("settings") or {}
    if entry.get("stage") == "finetune":
        return f"finetuned on {settings.get('tokens', 0):,} tokens with the original as the teacher"
    trained = f" and {settings['reconstruct']} passes of training by block" if settings.get("reconstruct") else ""
    return f"pruned to 2:4 (preset {settings.get('preset', 'unknown')}{trained})"


def _json(path: Path) -> dict[str, Any]:
    """An evaluation; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _weights(checkpoint: Checkpoint) -> Weights:
    """Read all linears, or some of them evenly spread."""
    stored = StoredLinears(checkpoint)
    names = list(stored.names)
    chosen = names if len(names) <= SAMPLE else [names[i * len(names) // SAMPLE] for i in range(SAMPLE)]
    codes = torch.zeros(2 * ZERO, dtype=torch.int64)
    bins: dict[int, int] = {}
    negative = groups = 0
    for name in chosen:
        linear = stored.read(name)
        codes += torch.bincount(linear.codes.flatten().int(), minlength=2 * ZERO)
        scales = linear.scales.float().flatten()
        negative, groups = negative + int((scales < 0).sum()), groups + scales.numel()
        found, counts = torch.unique((OCTAVE * scales[scales != 0].abs().log2()).floor().int(), return_counts=True)
        for index, count in zip(found.tolist(), counts.tolist(), strict=True):
            bins[index] = bins.get(index, 0) + count
    total = int(codes.sum())
    return Weights(
        codes=tuple(count / total for count in codes.tolist()),
        scales=_filled(bins, groups),
        negative=negative / groups,
        read=len(chosen),
        linears=len(names),
    )


def _filled(bins: Mapping[int, int], groups: int) -> tuple[tuple[float, float], ...]:
    """All bins between the lowest and the highest, empty ones too."""
    if not bins:
        return ()
    span: Sequence[int] = range(min(bins), max(bins) + 1)
    return tuple((2 ** (index / OCTAVE), bins.get(index, 0) / groups) for index in span)
