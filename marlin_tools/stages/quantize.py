"""Stage `quantize`: a 16-bit model and calibration tokens -> the same model with INT4 linears.

`_Work.run` and `_Work._solve` are the centre of the program: blocks stream by, each group of linears is solved against the
Hessian of what it really reads, the stream goes on with the quantised weights, and the block is on disk before the next one
is loaded.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, RTN, Algorithm, Solved
from marlin_tools.checkpoint import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.device import describe_device, pick_device
from marlin_tools.errors import NumericalError, RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.formats import FORMATS
from marlin_tools.journal import Journal, fingerprint_of
from marlin_tools.manifest import read_manifest, write_manifest
from marlin_tools.model_writer import ModelWriter
from marlin_tools.output import OutputDirectory
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.settings import Settings
from marlin_tools.stages.forecast import Forecast, forecast_quantize, in_words
from marlin_tools.stages.inventory import Inventory, check_format, take_inventory
from marlin_tools.stream import Block, Group, LayerStream

REVISION = 1
"""Raised when the same inputs would give other codes, so that old unfinished runs are not continued."""

REFERENCE_TOKENS = 64
"""Tokens whose logits are kept with the model, for `verify`."""

LARGE_ERROR = 0.25
"""A linear that loses more than this share of its output's energy is worth a warning."""


class QuantizeSettings(Settings):
    """What to quantise with.

    preset            a name in `algorithms.PRESETS`: default, fast, marlin (the paper's recipe), rtn
    algorithm         all settings of an algorithm, instead of a preset
    damp              overrides the preset's damping
    negative_scales   overrides whether scales may be negative
    group_size        inputs that share a scale; -1 for one scale per output column
    format            how the linears are stored
    ignore            regular expressions; linears whose full name matches stay as they are
    device            auto, cpu, cuda or cuda:N
    """

    preset: str = "default"
    algorithm: Algorithm | None = None
    damp: float | None = Field(None, gt=0, le=10)
    negative_scales: bool | None = None
    group_size: int = 128
    format: str = "compressed-tensors"
    ignore: tuple[str, ...] = ()
    device: str = "auto"

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"unknown preset `{name}`; known: {', '.join(PRESETS)}")
        return name

    @property
    def solver(self) -> RTN | GPTQ:
        """The algorithm with all overrides applied and checked."""
        base = self.algorithm or PRESETS[self.preset]
        overrides = {"damp": self.damp, "signed": self.negative_scales}
        changed = {key: value for key, value in overrides.items() if value is not None}
        if not changed:
            return base
        if isinstance(base, RTN):
            raise RecipeError(f"`{'`, `'.join(changed)}` means nothing to round-to-nearest", hint="choose another `--preset`")
        try:
            return GPTQ.model_validate({**base.model_dump(), **changed})
        except ValueError as error:
            raise RecipeError(f"preset `{self.preset}`: {error}", hint="drop the option that contradicts it") from error


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the work begins."""

    checkpoint: Checkpoint
    inventory: Inventory
    forecast: Forecast


def plan_quantize(model: str | Path | Checkpoint, settings: QuantizeSettings, tokens: int, longest: int) -> Plan:
    """Check a run and predict its cost from headers alone. `tokens` and `longest` describe the calibration."""
    check_format(settings.format)
    checkpoint = Checkpoint.open(model, accept=find_family)
    inventory = take_inventory(checkpoint, settings.ignore, settings.group_size, settings.format)
    device = pick_device(settings.device)
    needs_data = settings.solver.needs_data
    forecast = forecast_quantize(checkpoint, inventory, settings.solver, tokens if needs_data else 0, longest, device)
    return Plan(checkpoint, inventory, forecast)


def quantize(
    model: str | Path | Checkpoint,
    tokens: TokenSet | None,
    settings: QuantizeSettings,
    out: str | Path,
    *,
    emit: Emit = silent,
    overwrite: bool = False,
    resume: bool = True,
) -> Checkpoint:
    """Quantise `model` into the directory `out`; a killed run continues where it stopped, with the same bytes in the end."""
    emit(Event("stage", "quantize"))
    if settings.solver.needs_data and tokens is None:
        raise ValueError("this algorithm needs calibration tokens")
    plan = plan_quantize(model, settings, tokens.tokens if tokens else 0, tokens.longest if tokens else 0)
    for name, reason in plan.inventory.kept.items():
        emit(Event("note", f"`{name}` stays as it is: {reason}"))
    plan.forecast.check(Path(out))
    run = fingerprint_of(
        revision=REVISION,
        model=plan.checkpoint.fingerprint,
        tokens=tokens.fingerprint if tokens else None,
        solver=settings.solver.model_dump(),
        settings=settings.model_dump(exclude={"preset", "algorithm", "damp", "negative_scales"}),
        torch=torch.__version__,
    )
    if not overwrite and (finished := read_manifest(Path(out))) and finished.get("fingerprint") == run:
        emit(Event("note", f"`{out}` already holds this result; nothing to do"))
        return Checkpoint.open(out)
    with OutputDirectory(out, overwrite=overwrite, resume=resume) as output:
        begin = time.perf_counter()
        work = _Work(plan, settings, tokens, output, Journal(output, run), emit)
        entries = work.run()
        work.warn_about(entries)
        seconds = time.perf_counter() - begin
        comparison = plan.forecast.compare(seconds)
        times = comparison | {"blocks_s": [entry["seconds"] for entry in entries]}
        facts = {
            "fingerprint": run,
            "model": {"origin": plan.checkpoint.origin, "fingerprint": plan.checkpoint.fingerprint},
            "calibration": tokens.describe() if tokens and settings.solver.needs_data else None,
            "settings": settings.model_dump(mode="json"),
            "solver": settings.solver.model_dump(mode="json"),
            "format": settings.format,
            "device": describe_device(pick_device(settings.device)),
            "linears": [record for entry in entries for record in entry["linears"]],
            "kept": plan.inventory.kept,
        }
        work.finish()
        write_manifest(output, "quantize", facts, times, work.warnings)
        output.publish()
    emit(Event("note", in_words(comparison)))
    emit(Event("result", f"quantised {len(plan.inventory.targets)} linears into `{out}`", data=times))
    return Checkpoint.open(out)


class _Work:
    """One run of the stage."""

    def __init__(
        self,
        plan: Plan,
        settings: QuantizeSettings,
        tokens: TokenSet | None,
        output: OutputDirectory,
        journal: Journal,
        emit: Emit,
    ) -> None:
        self.checkpoint, self.inventory = plan.checkpoint, plan.inventory
        self.settings, self.solver, self.format = settings, settings.solver, FORMATS[settings.format]
        self.tokens = tokens if self.solver.needs_data else None
        self.output, self.journal, self.emit = output, journal, emit
        self.writer = ModelWriter(output, shards=plan.inventory.blocks + 1)
        self.warnings: list[str] = []

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Quantise block after block, then write everything that is not in a block; returns what each block recorded."""
        device = pick_device(self.settings.device)
        stream = LayerStream(self.checkpoint, self.tokens, self.inventory.names, device, with_original=self.solver.drift > 0)
        entries = []
        for block in stream:
            shard = self.writer.shard_path(block.index)
            entry = self.journal.finished(block.index, shard)
            if entry is not None:
                self._restore(block)
            else:
                begin = time.perf_counter()
                linears, records = self._solve(block)
                self.writer.write_shard(block.index, self._tensors(block.prefix, linears))
                entry = self.journal.record(
                    block.index, shard, {"linears": records, "seconds": round(time.perf_counter() - begin, 3)}
                )
            entries.append(entry)
            self.emit(Event("progress", "blocks", block.index + 1, len(stream)))
        self.writer.write_shard(self.inventory.blocks, self._rest())
        if stream.hidden is not None:
            ids, logits = stream.logits(REFERENCE_TOKENS)
            self.output.write_tensors("verify/reference.safetensors", {"tokens": ids, "logits": logits})
        return entries

    def finish(self) -> None:
        """Everything else that makes the shards a model."""
        kept = [*self.inventory.kept, self.inventory.family.head]
        self.writer.finish(self.checkpoint, self.format.quantization_config(self.settings.group_size, kept))

    def warn_about(self, entries: list[dict[str, Any]]) -> None:
        """Say what happened that the user did not ask for; resumed blocks included."""
        asked = getattr(self.solver, "damp", None)
        for record in (record for entry in entries for record in entry["linears"]):
            if record["damp"] is not None and record["damp"] != asked:
                self.warnings.append(f"`{record['name']}`: damping was raised from {asked:g} to {record['damp']:g}")
            if (record["output_error"] or 0.0) > LARGE_ERROR:
                self.warnings.append(f"`{record['name']}`: {record['output_error']:.0%} of the output is lost")
        for warning in self.warnings:
            self.emit(Event("warning", warning))

    def _solve(self, block: Block) -> tuple[dict[str, QuantizedLinear], list[dict[str, Any]]]:
        """Quantise all groups of a block, each as soon as what it reads is known."""
        linears: dict[str, QuantizedLinear] = {}
        records: list[dict[str, Any]] = []
        for group in block.groups(staged=self.solver.staged):
            for name, solved in self._solve_group(group).items():
                linears[name] = solved.linear
                group.replace(name, solved.linear.dequantize(group.weight(name).dtype))
                records.append(_record(name, solved))
        return linears, records

    def _solve_group(self, group: Group) -> dict[str, Solved]:
        """One solve for all linears of a group (their rows are independent), then one result each."""
        if not group.names:
            return {}
        self.emit(Event("progress", group.names[-1]))
        weight = group.stacked()
        group_size = self.settings.group_size if self.settings.group_size > 0 else weight.shape[1]
        solved = self.solver.solve(group.names[0], weight, group.hessian, group_size, self.checkpoint.dtype)
        return dict(zip(group.names, solved.split([group.weight(name).shape[0] for name in group.names]), strict=True))

    def _restore(self, block: Block) -> None:
        """Put the quantised weights of a finished block in place and move the activations past it."""
        written = load_file(self.writer.shard_path(block.index))
        for group in block.all_groups():
            for name in group.names:
                stored = {suffix: written[f"{name}.{suffix}"] for suffix in self.format.suffixes}
                n, k = group.weight(name).shape
                group.replace(name, self.format.unpack(stored, (n, k)).dequantize(group.weight(name).dtype))
        block.skip()

    def _tensors(self, prefix: str, linears: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
        """All tensors of a block: packed linears, and everything else as it was."""
        rest = [n for n in self.checkpoint.names() if n.startswith(prefix) and n.removesuffix(".weight") not in linears]
        tensors = {name: self.checkpoint.read(name) for name in rest}
        for name, linear in linears.items():
            for suffix, tensor in self.format.pack(linear, self.checkpoint.dtype).items():
                tensors[f"{name}.{suffix}"] = tensor
        return tensors

    def _rest(self) -> dict[str, Tensor]:
        """Everything that belongs to no block: embeddings, final norm, head."""
        blocks = tuple(self.inventory.family.block_prefix(i) for i in range(self.inventory.blocks))
        return {name: self.checkpoint.read(name) for name in self.checkpoint.names() if not name.startswith(blocks)}


def _record(name: str, solved: Solved) -> dict[str, Any]:
    """What the manifest says about one linear; a solution that is not finite stops the run here."""
    if not math.isfinite(solved.output_error or 0.0) or not math.isfinite(solved.weight_error):
        raise NumericalError(
            f"`{name}`: the solution is not finite", hint="try a higher `--damp`, or leave it out with `--ignore`"
        )
    error = None if solved.output_error is None else float(f"{solved.output_error:.6g}")
    return {
        "name": name,
        "shape": list(solved.linear.shape),
        "output_error": error,
        "weight_error": float(f"{solved.weight_error:.6g}"),
        "damp": solved.damp,
    }
