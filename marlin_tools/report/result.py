"""Everything that is known of a model directory, in one value: what the page and the model card are written from."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint, hub_name
from marlin_tools.errors import counted
from marlin_tools.evaluation.record import read_record
from marlin_tools.evaluation.scores import Evaluation, Score
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import LEVELS, ZERO
from marlin_tools.verification.inspect import inspect
from marlin_tools.verification.verify import Verification

SAMPLE = 32
"""Linears that are read for the histograms; smaller models are read whole."""

OCTAVE = 4
"""Bins of the histogram of scales per factor of two."""


Bar = tuple[float, str]
"""(value, what it says when pointed at)"""


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

    @property
    def code_bars(self) -> list[Bar]:
        """A bar for each code."""
        return [(share, f"code {code - ZERO:+d}: {share:.2%} of the weights") for code, share in enumerate(self.codes)]

    @property
    def scale_bars(self) -> list[Bar]:
        """A bar for each bin of scales."""
        return [(share, f"from {low:.3g}: {share:.2%} of the groups") for low, share in self.scales]

    @property
    def scale_axis(self) -> list[str]:
        """The least, a middle and the largest magnitude."""
        lows = [low for low, _ in self.scales]
        return [f"{low:.2g}" for low in (lows[0], lows[len(lows) // 2], lows[-1] * 2 ** (1 / OCTAVE))]


@dataclass(frozen=True)
class Losses:
    """What every linear lost of its `of`: "output's" energy, or "weights'" where outputs were not measured."""

    of: str
    entries: Sequence[Mapping[str, Any]]
    key: str

    @property
    def top(self) -> float:
        """The largest."""
        return max(float(entry[self.key]) for entry in self.entries)

    @property
    def kinds(self) -> dict[str, list[Bar]]:
        """For each kind of linear a bar for every block: the loss, of experts the largest; none where it was left as it is."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.entries:
            inside = re.search(r"\.(\d+)\.(.*)", entry["name"])
            block, kind = (int(inside[1]), re.sub(r"\.\d+\.", ".*.", inside[2])) if inside else (0, entry["name"])
            losses = found.setdefault(kind, {})
            losses[block] = max(losses.get(block, 0.0), float(entry[self.key]))
        blocks = range(1 + max(block for losses in found.values() for block in losses))
        return {kind: [_bar(block, losses.get(block)) for block in blocks] for kind, losses in found.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `rows`."""
        others = [name for name, key in _MEASURES.items() if any(isinstance(entry.get(key), float) for entry in self.entries)]
        return ("linear", "outputs x inputs", *others)

    @property
    def rows(self) -> list[list[str]]:
        """All linears, those that lost most first."""
        keys = [_MEASURES[name] for name in self.columns[2:]]
        ordered = sorted(self.entries, key=lambda entry: -entry[self.key])
        return [
            [entry["name"], " x ".join(map(str, entry["shape"])), *(_measure(entry, key) for key in keys)] for entry in ordered
        ]


_MEASURES = {"output lost": "output_error", "weight lost": "weight_error", "damp": "damp"}
"""Columns of the table of linears: what they are called, and where the manifest has them."""


def _bar(block: int, loss: float | None) -> Bar:
    return (0.0, f"block {block}: left as it is") if loss is None else (loss, f"block {block}: {loss:.3%}")


def _measure(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return "" if value is None else f"{value:g}" if key == "damp" else f"{value:.3%}"


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
    def stage(self) -> str:
        """What made it."""
        return str(self.manifest.get("stage", ""))

    @property
    def linears(self) -> Sequence[Mapping[str, Any]]:
        """What the manifest says of each linear."""
        return self.manifest.get("linears", [])

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """The text that it was made with."""
        return self.manifest.get("calibration")

    @property
    def learned_last(self) -> bool:
        """Whether a teacher's lessons were the last that changed the weights: `calibration` is then what it was trained on."""
        return "teacher" in self.manifest

    @property
    def text_role(self) -> str:
        """What `calibration` was to it."""
        return "training text" if self.learned_last else "calibration"

    @property
    def recorded(self) -> bool:
        """Whether it is known how it was made; of what another tool has quantised nobody knows."""
        steps = (*self.manifest.get("history", ()), self.manifest)
        return not self.quantized or any(_kind(each) == "quantize" for each in steps)

    @property
    def original(self) -> Mapping[str, Any]:
        """Origin and fingerprint of the model that everything began with."""
        steps: list[Mapping[str, Any]] = [*self.manifest.get("history", ()), self.manifest]
        return steps[0].get("model") or {}

    @property
    def base(self) -> str:
        """What the original is called: a hub id, or the last part of a path, which says nothing of this machine."""
        origin, _ = hub_name(str(self.original.get("origin") or self.facts["model"]))
        return origin if self.base_is_public(origin) else Path(origin).name

    @property
    def public(self) -> bool:
        """Whether the original can be looked up on the hub."""
        return self.base_is_public(self.base)

    @staticmethod
    def base_is_public(origin: str) -> bool:
        """Whether a name can be looked up on the hub."""
        return re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", origin, re.ASCII) is not None and not Path(origin).is_dir()

    @property
    def title(self) -> str:
        """The original's name, without its owner."""
        return self.base.rpartition("/")[2]

    @property
    def scheme(self) -> str:
        """Bits, what shares a scale, and FP8 activations, for a headline."""
        if not self.quantized:
            return "2:4, 16 bits" if (self.facts["sparsity"] or {}).get("2:4") else "16 bits"
        groups = ", ".join("per column" if size == -1 else f"g{size}" for size in self.facts["group_sizes"])
        sparsity = self.facts["sparsity"] or {}
        pattern = " 2:4" if sparsity.get("2:4") else " 2:4 in part" if sparsity.get("sparse") else ""
        reads = ", FP8 activations" if self.facts["activations"] == "fp8" else ""
        return f"INT4 {groups}" + pattern + reads

    @property
    def method(self) -> str:
        """Preset and algorithm in a few words."""
        settings, solver = self.manifest.get("settings") or {}, self.manifest.get("solver") or {}
        before = [] if self.recorded else [_ELSEWHERE]
        before += [_before(each) for each in self.manifest.get("history", ()) if _kind(each)]
        if self.learned_last:  # in another format, too
            return ", then ".join([*before, _before({"stage": "finetune", "settings": settings})])
        if not self.recorded:
            return ", then ".join(before)
        if not self.quantized:
            return ", then ".join([*before, *([_before(self.manifest)] if self.stage == "prune" else [])])
        kind = {"gptq": "GPTQ", "rtn": "round to nearest"}.get(str(solver.get("kind")), str(solver.get("kind", "unknown")))
        how = kind if settings.get("algorithm") else f"{kind}, preset {settings.get('preset', 'unknown')}"
        return ", then ".join([*before, how])

    @property
    def finetuned(self) -> bool:
        """Whether the weights, and the norms with them, have been trained on the way."""
        return self.learned_last or any(_kind(each) == "finetune" for each in self.manifest.get("history", ()))

    @property
    def quantized(self) -> bool:
        """Whether the weights are codes and scales, rather than 16-bit numbers with zeros among them."""
        return self.facts["format"] is not None

    @property
    def bits(self) -> float:
        """Stored bits per quantised weight, scales included; of a model that is not quantised those of its type."""
        if not self.quantized:
            return 32.0 if "32" in str(self.facts["dtype"]) else 16.0
        return 8 * self.facts["bytes"]["quantized linears"] / max(1, self.facts["quantized_weights"])

    @property
    def before_bytes(self) -> int:
        """What the same model takes in 16 bits."""
        sizes = self.facts["bytes"]
        return int(sizes["total"] - sizes["quantized linears"] + 2 * self.facts["quantized_weights"])

    @property
    def headline(self) -> Score | None:
        """The score that suffered most, of those that rest on enough to be said in one number.

        One that is not finite is the worst, and comes of no chance, however few items were asked.
        """
        scores = self.evaluation.scores if self.evaluation else ()
        whole = [score for score in scores if score.part_of is None and score.recovery is not None]
        sure = [score for score in whole if score.firm or not math.isfinite(score.value)]
        return min(sure, key=lambda score: (math.isfinite(score.value), score.recovery or 0.0), default=None)

    @property
    def losses(self) -> Losses | None:
        """By outputs if they were measured, else by weights, if anything was."""
        for of, key in (("output's", "output_error"), ("weights'", "weight_error")):
            if measured := [entry for entry in self.linears if entry.get(key) is not None]:
                return Losses(of, measured, key)
        return None

    @property
    def stays_dense(self) -> str:
        """Which linears are not 2:4 though all others are, and what they were chosen by."""
        if (choice := self.manifest.get("kept_dense")) is None:
            return ""
        names = ", ".join(f"`{name}`" for name in choice["linears"])
        how = f"chosen by what 2:4 costs the output of their block, measured on {choice['tokens']:,} tokens"
        return f"{len(choice['linears'])} linears, {choice['share']:.1%} of the weights, {how}: {names}"

    @property
    def taker(self) -> str:
        """What the losses of the linears come from."""
        if not self.quantized:
            return "pruning has"
        return "pruning and rounding have" if (self.manifest.get("settings") or {}).get("sparsity") == "2:4" else "rounding has"

    @property
    def learning(self) -> list[Bar]:
        """A bar for each time that a finetuned model was held against its teacher."""
        measured: Sequence[tuple[int, float]] = self.manifest.get("held_out_kl", [])
        return [(kl, f"after {counted(step, 'step')}: {kl:.4f} nats") for step, kl in measured] if len(measured) > 1 else []

    @property
    def learned(self) -> str:
        """What training left alone, or which state it has kept."""
        zeros = "" if self.quantized else "The zeros stayed where they were. "
        return f"{zeros}Kept is the best state, that after {counted(self.manifest.get('best_step', 0), 'step')}."

    @property
    def stages(self) -> dict[str, Mapping[str, float]]:
        """What each stage has cost; one that read no text is not said to have calibrated."""
        costs: Mapping[str, Mapping[str, float]] = self.manifest.get("times", {}).get("stages", {})
        return {stage if self.calibration else stage.removeprefix("calibrate and "): cost for stage, cost in costs.items()}

    @property
    def seconds(self) -> float | None:
        """What making it took, without measuring and checking it."""
        made = [cost["seconds"] for stage, cost in self.stages.items() if stage not in {"evaluate", "verify"}]
        return sum(made) if made else None

    @property
    def remarks(self) -> list[str]:
        """What was left out, replaced, or refused."""
        lines = [f"Warning: {text}" for text in self.manifest.get("warnings", [])]
        lines += [f"`{name}` was left as it is: {reason}" for name, reason in self.manifest.get("kept", {}).items()]
        lines += [f"{self.text_role.capitalize()}: {note}" for note in (self.calibration or {}).get("notes", ())]
        for check in self.verification.checks if self.verification else ():
            verb = "was skipped" if check.skipped else "failed"
            lines += [f"Check `{check.name}` {verb}: {check.detail}"] if check.skipped or not check.ok else []
        return lines + ["Not verified in this run."] * (self.verification is None and self.quantized)

    @property
    def origin_facts(self) -> list[tuple[str, str]]:
        """How it was made, down to the versions."""
        manifest, tokens = self.manifest, self.calibration
        fingerprint = str(self.original.get("fingerprint", "unknown"))[:16]
        rows = [("original", f"`{self.base}`, fingerprint `{fingerprint}`"), ("method", self.method)]
        if solver := manifest.get("solver"):
            rows.append(
                ("solver", ", ".join(f"{key} {value}" for key, value in solver.items() if key != "kind") or "no settings")
            )
        if tokens:
            shape = f"{counted(tokens['sequences'], 'sequence')}, {tokens['tokens']:,} tokens, seed {tokens['seed']}"
            rows.append((self.text_role, f"`{tokens['source']}`: {shape}, fingerprint `{tokens['fingerprint'][:16]}`"))
        if errors := list(dict.fromkeys(tuple(each["block_error"]) for each in self.linears if each.get("block_error"))):
            told = ", ".join(f"{before:.3%} -> {after:.3%}" for before, after in errors)
            rows.append(("error of each block, before and after it was trained", told))
        if self.stays_dense:
            rows.append(("not 2:4", self.stays_dense))
        rows += [("computed on", str(manifest.get("device", "unknown")))] if self.recorded or self.learned_last else []
        return [*rows, ("versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()))]


def gather(
    directory: Path, verification: Verification | None, evaluation: Evaluation | None = None, *, weights: bool = True
) -> Result:
    """Read a model directory; what is not there is None or empty. Its own evaluation goes before one that is handed over."""
    checkpoint = Checkpoint.open(directory)
    content = read_record(directory)
    return Result(
        manifest=read_manifest(directory) or {},
        facts=inspect(checkpoint),
        weights=_weights(checkpoint) if weights and checkpoint.quantization is not None else None,
        evaluation=Evaluation.restore(content) if content else evaluation,
        verification=verification,
        recipe=(directory / "recipe.yaml").read_text(encoding="utf-8") if (directory / "recipe.yaml").is_file() else "",
    )


_ELSEWHERE = "quantised by another tool (how is not recorded)"
"""The method of a model without a manifest that says more."""


def _kind(entry: Mapping[str, Any]) -> str:
    """What changed the weights; an export has the settings of what it has stored anew, and none if another tool made that."""
    if (stage := str(entry.get("stage", ""))) != "export":
        return stage
    settings = entry.get("settings") or {}
    return "finetune" if "tokens" in settings else "quantize" if settings else ""


def _before(entry: Mapping[str, Any]) -> str:
    """A stage that the weights have been through."""
    settings = entry.get("settings") or {}
    if _kind(entry) == "quantize":
        return f"quantised (preset {settings.get('preset', 'unknown')})"
    if _kind(entry) == "finetune":
        return f"finetuned on {settings.get('tokens', 0):,} tokens with the original as the teacher"
    trained = f" and {settings['reconstruct']} passes of training by block" if settings.get("reconstruct") else ""
    return f"pruned to 2:4 (preset {settings.get('preset', 'unknown')}{trained})"


def _weights(checkpoint: Checkpoint) -> Weights:
    """Read all linears, or some of them evenly spread."""
    stored = StoredLinears(checkpoint)
    names = list(stored.names)
    chosen = names if len(names) <= SAMPLE else [names[i * len(names) // SAMPLE] for i in range(SAMPLE)]
    codes = torch.zeros(LEVELS, dtype=torch.int64)
    bins: dict[int, int] = {}
    negative = groups = 0
    for name in chosen:
        linear = stored.read(name)
        codes += torch.bincount(linear.codes.flatten().int(), minlength=LEVELS)
        scales = linear.scales.float().flatten()
        negative, groups = negative + int((scales < 0).sum()), groups + scales.numel()
        shown = scales[(scales != 0) & scales.isfinite()]  # `verify` speaks of the others
        found, counts = torch.unique((OCTAVE * shown.abs().log2()).floor().int(), return_counts=True)
        for index, count in zip(found.tolist(), counts.tolist(), strict=True):
            bins[index] = bins.get(index, 0) + count
    total = int(codes.sum())
    span = range(min(bins), max(bins) + 1) if bins else ()  # empty bins between them, too
    return Weights(
        codes=tuple(count / total for count in codes.tolist()),
        scales=tuple((2 ** (index / OCTAVE), bins.get(index, 0) / groups) for index in span),
        negative=negative / groups,
        read=len(chosen),
        linears=len(names),
    )
