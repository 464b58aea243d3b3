"""What `prune` and `quantize` share around the loop: a directory that appears whole or not at all, continues where a killed run
stopped, with the same bytes in the end, and says how it came to be.
"""

import gc
import time
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from marlin_tools.algorithms import GPTQ, RTN, Pruner
from marlin_tools.checkpoint.journal import Journal, fingerprint_of
from marlin_tools.checkpoint.manifest import history, holds, write_manifest
from marlin_tools.checkpoint.output import OutputDirectory, check_output
from marlin_tools.checkpoint.patterns import compiled
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import check_finite
from marlin_tools.checkpoint.writer import ModelWriter, check_companions
from marlin_tools.compress.forecast import Forecast, in_words
from marlin_tools.compress.loop import Method, Store, compress_blocks
from marlin_tools.compress.shards import REFERENCE_TOKENS, Shards
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import DeviceName, computing_on, describe_device, forget_peaks
from marlin_tools.distributed.team import ALONE, Team
from marlin_tools.errors import DeviceError, counted
from marlin_tools.events import Emit, Event
from marlin_tools.quantized import ActivationType
from marlin_tools.settings import Settings, checked
from marlin_tools.stage import Stage, made_with
from marlin_tools.stopwatch import span
from marlin_tools.stream.inventory import Inventory
from marlin_tools.stream.layer_stream import LayerStream

CUT = 2
"""Raised when processes that share the work would give other bytes, so that old unfinished runs are not continued."""

LARGE_ERROR = 0.25
"""A linear that loses more than this share of its output's energy is worth a warning."""

_NOT_ALONE = {"device", "preset", "algorithm", "damp", "negative_scales", "group_size", "tuning"}
"""Settings of which several values can come to the same, or that the solver has."""


class BlockStage(Stage):
    """What the stages that go through a model block by block are told alike."""

    remakes: ClassVar[bool] = True

    preset: str = "default"
    damp: float | None = Field(None, gt=0, le=10)
    ignore: tuple[Annotated[str, checked(partial(compiled, source="the pattern"))], ...] = ()
    device: DeviceName = "auto"

    @property
    @abstractmethod
    def solver(self) -> RTN | GPTQ | Pruner:
        """The algorithm with all overrides applied and checked."""

    @property
    def decides(self) -> tuple[Settings, dict[str, Any]]:
        """What two runs cannot differ in and have one result; there is more that decides, such as model and text."""
        return self.solver, self.model_dump(exclude=_NOT_ALONE)

    def differs(self, before: Stage) -> bool:
        """Whether anything of it is another."""
        return isinstance(before, BlockStage) and self.decides != before.decides

    @property
    def needs_data(self) -> bool:
        """Whether it looks at the calibration text."""
        return self.solver.needs_data

    @property
    def choice(self) -> str:
        """The preset."""
        return f"preset `{self.preset}`"


@dataclass(frozen=True)
class Preparation:
    """What is known before the work begins; `group_sizes` are those of linears that will be codes."""

    checkpoint: Checkpoint
    inventory: Inventory
    forecast: Forecast
    group_sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One stage on one model.

    stage      its name
    tokens     what the solver looks at; None for a solver that needs no data
    settings   all that the user chose, for the manifest
    identity   the part of it that decides the result, beside model, tokens, solver and the kind of device
    facts      what else the manifest records
    config     what config.json says about how the linears are stored; None if as in the original
    original   whether the original model runs alongside
    team       the processes that do it; the first one writes
    activations  what the linears will read
    """

    stage: str
    prepared: Preparation
    tokens: TokenSet | None
    solver: RTN | GPTQ | Pruner
    settings: Settings
    identity: dict[str, Any]
    facts: dict[str, Any]
    config: dict[str, Any] | None
    device: torch.device
    original: bool
    team: Team = ALONE
    activations: ActivationType = "16bit"
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """The same for two runs that must give the same bytes; a CPU and a GPU round differently."""
        return fingerprint_of(
            model=self.prepared.checkpoint.fingerprint,
            tokens=self.tokens.fingerprint if self.tokens else None,
            solver=self.solver.model_dump(),
            device=self.device.type,
            torch=torch.__version__,
            **({"cut": CUT} if self.team.cuts else {}),
            **self.identity,
        )


def compress(
    job: Job, method: Method, store: Store, out: str | Path, emit: Emit, *, overwrite: bool, resume: bool
) -> Checkpoint:
    """Do the work into the directory `out`. Too little GPU memory: again with smaller chunks, from where it stopped."""
    plan, team, begin = job.prepared, job.team, time.perf_counter()
    forget_peaks(job.device)
    for name, reason in plan.inventory.kept.items():
        emit(Event("note", f"`{name}` stays as it is: {reason}"))
    check_output(out, (plan.checkpoint.path,), overwrite=True)
    plan.forecast.check(Path(out))
    check_companions(plan.checkpoint)
    check_finite(plan.inventory.checkpoint, sorted(plan.inventory.kept_tensors))
    run = job.fingerprint if team.leads else ""
    finished = team.leads and not overwrite and holds(Path(out), run)
    if team.decide(choice=finished):
        emit(Event("note", f"`{out}` already holds this result; nothing to do"))
        return Checkpoint.open(out)
    output = OutputDirectory(out, overwrite=overwrite, resume=resume, sources=(plan.checkpoint.path,))
    with computing_on(job.device), output if team.leads else nullcontext():
        journal = Journal(output, run, made_with(job.settings, job.tokens)) if team.leads else None
        writer = ModelWriter(output, shards=plan.inventory.blocks + 1)
        shards = Shards(plan.inventory, writer, journal, job.device, joins=store.joins)
        tokens, stream = method.chunk, None
        while True:
            try:
                _look_ahead(job, method, tokens, output, emit)
                stream = _stream(job, tokens)
                stream.look_at(REFERENCE_TOKENS, rounded=job.activations == "fp8")
                shards.start()
                compress_blocks(stream, method, store, shards, team, emit)
                break
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)
            stream = None  # nothing of this pass is left on the device when the next one begins
            tokens = _fewer(job, tokens, failure, emit)
        if team.leads:
            writer.finish(plan.checkpoint, job.config)
            _publish(job, output, run, shards.entries, time.perf_counter() - begin, emit)
        team.wait()
    return Checkpoint.open(out)


def _stream(job: Job, chunk_tokens: int) -> LayerStream:
    with span("embed"):
        stream = LayerStream(
            job.prepared.checkpoint,
            job.tokens,
            job.prepared.inventory.names,
            job.device,
            with_original=job.original,
            chunk_tokens=chunk_tokens,
            team=job.team,
        )
        stream.drift = job.solver.drift > 0
    return stream


def _look_ahead(job: Job, method: Method, chunk_tokens: int, output: OutputDirectory, emit: Emit) -> None:
    """What has to be known before the first block, if it is not: in passes of their own, in which the original flows alone."""

    def stream_of(text: TokenSet) -> LayerStream:
        return _stream(replace(job, tokens=text, original=False), chunk_tokens)

    if method.dense and job.tokens:
        method.dense.make(job.tokens, stream_of, output, job.team, emit)
        job.facts["kept_dense"] = method.dense.facts
    if method.guide and job.tokens:
        method.guide.make(job.tokens, stream_of, output)
        job.facts["guide"] = method.guide.facts


def _fewer(job: Job, tokens: int, error: torch.OutOfMemoryError, emit: Emit) -> int:
    """How many tokens to try at a time after the device has run out of memory; raises if they cannot be fewer."""
    longest = job.tokens.longest if job.tokens else tokens
    if tokens <= longest or job.team.size > 1:
        raise DeviceError(
            f"`{job.device}` lacks memory even for {tokens} tokens at a time: {str(error).split('.')[0]}",
            hint="use fewer or shorter samples (`--num-samples`, `--seqlen`), or another `--device`",
        ) from error
    said = f"`{job.device}` ran out of memory; going on with {tokens // 2} tokens at a time"
    job.warnings.append(said)
    emit(Event("note", said))
    gc.collect()
    torch.cuda.empty_cache()
    return tokens // 2


def _publish(job: Job, output: OutputDirectory, run: str, entries: list[dict[str, Any]], seconds: float, emit: Emit) -> None:
    """Give the model its manifest and its final name."""
    plan = job.prepared
    linears = [record for entry in entries for record in entry["linears"]]
    warnings = [*job.warnings, *_warnings(job, linears)]
    for warning in warnings:
        emit(Event("warning", warning))
    comparison = plan.forecast.compare(seconds)
    times = comparison | {"blocks_s": [entry["seconds"] for entry in entries], "processes": job.team.size}
    facts = {
        "fingerprint": run,
        "model": {"origin": plan.checkpoint.origin, "fingerprint": plan.checkpoint.fingerprint},
        "calibration": job.tokens.describe() if job.tokens else None,
        "settings": job.settings.model_dump(mode="json", exclude={"stage"}),
        "solver": job.solver.model_dump(mode="json"),
        **job.facts,
        **history(plan.checkpoint.path),
        "device": describe_device(job.device),
        "linears": linears,
        "kept": plan.inventory.kept,
    }
    write_manifest(output, job.stage, facts, times, warnings)
    output.publish()
    emit(Event("note", in_words(comparison)))
    emit(Event("result", f"{job.stage}: {counted(len(plan.inventory.targets), 'linear')} into `{output.out}`", data=times))


def _warnings(job: Job, linears: list[dict[str, Any]]) -> list[str]:
    """What happened that the user did not ask for; resumed blocks included."""
    asked = getattr(job.solver, "damp", None)
    said = []
    if lost := [record["name"] for record in linears if record.get("mask") == "lost"]:
        said.append(f"the 2:4 zeros of {len(lost)} linears were not kept (`{lost[0]}`); `--sparsity keep` keeps them")
    said += dict.fromkeys(record["tuning_stopped"] for record in linears if "tuning_stopped" in record)
    for record in linears:
        if record["damp"] is not None and record["damp"] != asked:
            said.append(f"`{record['name']}`: damping was raised from {asked:g} to {record['damp']:g}")
        if (record["output_error"] or 0.0) > LARGE_ERROR:
            said.append(f"`{record['name']}`: {record['output_error']:.0%} of the output is lost")
    return said
