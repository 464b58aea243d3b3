"""The loop that `prune` and `quantize` share, and everything around it that makes a result of it.

`BlockWork.run` and `BlockWork._solve` are the centre of the program: blocks stream by, each group of linears is solved against
the Hessian of what it really reads, the stream goes on with the new weights, and the block is on disk before the next one is
loaded. A stage is a `BlockWork` that says how one group is solved and how its linears are stored; `make` turns it into a
directory that appears whole or not at all, and that a later run of the same job continues or finds finished.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from marlin_tools.checkpoint.journal import Journal, fingerprint_of
from marlin_tools.checkpoint.manifest import history, holds, write_manifest
from marlin_tools.checkpoint.output import OutputDirectory, check_output
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import check_finite
from marlin_tools.checkpoint.writer import ModelWriter
from marlin_tools.compress.forecast import Forecast, in_words
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.crew import ALONE, Crew
from marlin_tools.distributed.device import describe_device
from marlin_tools.errors import DeviceError, NumericalError
from marlin_tools.events import Emit, Event
from marlin_tools.settings import Settings
from marlin_tools.stopwatch import apart, span
from marlin_tools.stream.background import Background
from marlin_tools.stream.host_copy import HostCopies
from marlin_tools.stream.inventory import Inventory
from marlin_tools.stream.layer_stream import CHUNK_TOKENS, Block, Group, LayerStream

REFERENCE_TOKENS = 64
"""Tokens whose logits are kept with the model, for `verify`."""

LARGE_ERROR = 0.25
"""A linear that loses more than this share of its output's energy is worth a warning."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the work begins."""

    checkpoint: Checkpoint
    inventory: Inventory
    forecast: Forecast


class Solver(Protocol):
    """What the loop wants to know of an algorithm's settings."""

    @property
    def needs_data(self) -> bool:
        """Whether the stream has to be fed with calibration tokens."""

    @property
    def staged(self) -> bool:
        """Whether later groups of a block see the new outputs of earlier ones."""

    @property
    def drift(self) -> float:
        """Above 0, the original model runs alongside."""

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """All settings as plain data."""


@dataclass(frozen=True)
class Job:
    """One stage on one model.

    stage     its name
    tokens    what the solver looks at; None for a solver that needs no data
    settings  all that the user chose, for the manifest
    identity  the part of it that decides the result, beside model, tokens and solver
    facts     what else the manifest records
    crew      the processes that do it; the first one writes
    """

    stage: str
    plan: Plan
    tokens: TokenSet | None
    solver: Solver
    settings: Settings
    identity: dict[str, Any]
    facts: dict[str, Any]
    device: torch.device
    crew: Crew = ALONE

    @property
    def fingerprint(self) -> str:
        """The same for two runs that must give the same bytes."""
        return fingerprint_of(
            model=self.plan.checkpoint.fingerprint,
            tokens=self.tokens.fingerprint if self.tokens else None,
            solver=self.solver.model_dump(),
            torch=torch.__version__,
            **({"cut": True} if self.crew.cuts else {}),
            **self.identity,
        )


@dataclass(frozen=True)
class Made:
    """What has become of one linear.

    weight   what the stream goes on with
    stored   the tensors to write, by suffix
    record   what the manifest says about it
    """

    weight: Tensor
    stored: dict[str, Tensor]
    record: dict[str, Any]


def make(
    job: Job,
    work_of: Callable[[Job, OutputDirectory, Journal | None, Emit], "BlockWork"],
    out: str | Path,
    emit: Emit,
    *,
    overwrite: bool,
    resume: bool,
) -> Checkpoint:
    """Do the work into the directory `out`; a killed run continues where it stopped, with the same bytes in the end."""
    plan = job.plan
    for name, reason in plan.inventory.kept.items():
        emit(Event("note", f"`{name}` stays as it is: {reason}"))
    check_output(out, (plan.checkpoint.path,), overwrite=True)
    plan.forecast.check(Path(out))
    solved = {f"{name}.weight" for name in plan.inventory.names}  # these are looked at when they are read
    check_finite(plan.checkpoint, (name for name in plan.checkpoint.names() if name not in solved))
    crew, begin = job.crew, time.perf_counter()
    run = job.fingerprint if crew.leads else ""
    finished = crew.leads and not overwrite and holds(Path(out), run)
    if crew.decide(choice=finished):
        emit(Event("note", f"`{out}` already holds this result; nothing to do"))
        return Checkpoint.open(out)
    output = OutputDirectory(out, overwrite=overwrite, resume=resume, sources=(plan.checkpoint.path,))
    with output if crew.leads else nullcontext():
        work = work_of(job, output, Journal(output, run) if crew.leads else None, emit)
        entries = work.run()
        if crew.leads:
            _publish(work, run, entries, time.perf_counter() - begin)
        crew.wait()
    return Checkpoint.open(out)


def _publish(work: "BlockWork", run: str, entries: list[dict[str, Any]], seconds: float) -> None:
    """Make a model of the shards, with its manifest, under its final name."""
    job, plan, output = work.job, work.job.plan, work.output
    work.warn_about(entries)
    comparison = plan.forecast.compare(seconds)
    times = comparison | {"blocks_s": [entry["seconds"] for entry in entries], "processes": job.crew.size}
    facts = {
        "fingerprint": run,
        "model": {"origin": plan.checkpoint.origin, "fingerprint": plan.checkpoint.fingerprint},
        "calibration": job.tokens.describe() if job.tokens else None,
        "settings": job.settings.model_dump(mode="json"),
        "solver": job.solver.model_dump(mode="json"),
        **job.facts,
        **history(plan.checkpoint.path),
        "device": describe_device(job.device),
        "linears": [record for entry in entries for record in entry["linears"]],
        "kept": plan.inventory.kept,
    }
    work.finish()
    write_manifest(output, job.stage, facts, times, work.warnings)
    output.publish()
    work.emit(Event("note", in_words(comparison)))
    work.emit(Event("result", f"{job.stage}: {len(plan.inventory.targets)} linears into `{output.out}`", data=times))


class BlockWork(ABC):
    """One run of a stage over all blocks. `suffixes` are the tensors that it stores for each linear."""

    suffixes: tuple[str, ...]

    def __init__(self, job: Job, output: OutputDirectory, journal: Journal | None, emit: Emit) -> None:
        self.job, self.output, self.journal, self.emit = job, output, journal, emit
        self.checkpoint, self.inventory = job.plan.checkpoint, job.plan.inventory
        self.writer = ModelWriter(output, shards=self.inventory.blocks + 1)
        self.warnings: list[str] = []
        self._since = time.perf_counter()
        self._copies = HostCopies(job.device)

    @abstractmethod
    def solve(self, group: Group) -> dict[str, Made]:
        """Solve the linears of one group; there is at least one."""

    @abstractmethod
    def restored(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """The weight that the tensors of a finished linear stand for; `like` is what it replaces."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says about how the linears are stored; None if as in the original."""

    @property
    def compares(self) -> bool:
        """Whether the original model runs alongside."""
        return self.job.solver.drift > 0

    def begin(self, block: Block) -> None:  # noqa: B027 (most stages have nothing to do here)
        """What is to do before the first group of a block is solved; by default nothing."""

    def settle(self, block: Block, made: dict[str, Made]) -> dict[str, Made]:
        """What is left to do once all groups of a block are solved; by default nothing."""
        return made

    def run(self) -> list[dict[str, Any]]:
        """Work on block after block; returns what each recorded.

        Too little GPU memory: again with smaller chunks, from where it stopped.
        """
        tokens = CHUNK_TOKENS
        longest = self.job.tokens.longest if self.job.tokens else tokens
        while True:
            try:
                return self._run(tokens)
            except torch.OutOfMemoryError as error:
                if tokens <= longest or self.job.crew.size > 1:
                    raise DeviceError(
                        f"`{self.job.device}` lacks memory even for {tokens} tokens at a time: {str(error).split('.')[0]}",
                        hint="use fewer or shorter samples (`--num-samples`, `--seqlen`), or another `--device`",
                    ) from error
            tokens //= 2
            self.warnings.append(f"`{self.job.device}` ran out of memory; going on with {tokens} tokens at a time")
            self.emit(Event("note", self.warnings[-1]))
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _run(self, chunk_tokens: int) -> list[dict[str, Any]]:
        job = self.job
        with span("embed"):
            stream = LayerStream(
                self.checkpoint,
                job.tokens,
                self.inventory.names,
                job.device,
                with_original=self.compares,
                chunk_tokens=chunk_tokens,
                crew=job.crew,
            )
        entries: list[dict[str, Any]] = []
        self._since = time.perf_counter()
        with Background("writer") as writing:
            for block in stream:
                entry = self.journal.finished(block.index, self.writer.shard_path(block.index)) if self.journal else None
                if job.crew.decide(choice=entry is not None):
                    writing.wait()  # entries are in the order of the blocks
                    self._restore(block)
                    entries += [entry] if entry else []
                    self._since = time.perf_counter()
                elif self.journal:
                    writing.hand_over(self._writing(self.journal, entries, block, self._solve(block)))
                else:
                    self._solve(block)
                self.emit(Event("progress", "blocks", block.index + 1, len(stream)))
            if self.journal:
                writing.hand_over(lambda: self.writer.write_shard(self.inventory.blocks, self._rest()))
                if stream.hidden is not None:
                    ids, logits = stream.logits(REFERENCE_TOKENS)
                    reference = {"tokens": ids, "logits": logits}
                    writing.hand_over(lambda: self.output.write_tensors("verify/reference.safetensors", reference))
        return entries

    def _writing(
        self, journal: Journal, entries: list[dict[str, Any]], block: Block, made: dict[str, Made]
    ) -> Callable[[], None]:
        """What is left to do for a solved block: put it on disk, and only then say that it is finished.

        Holds nothing but what is to be written, so that the new weights can go. A block's seconds are those since the one
        before it.
        """
        index, prefix = block.index, block.prefix
        stored = {f"{name}.{suffix}": tensor for name, each in made.items() for suffix, tensor in each.stored.items()}
        records = [each.record for each in made.values()]
        ready = self._copies.mark()

        def write() -> None:
            with apart("write"):
                fetched = self._copies.fetch(stored, ready)
                stored.clear()
                self.writer.write_shard(index, self._untouched(prefix, {record["name"] for record in records}) | fetched)
                before, self._since = self._since, time.perf_counter()
                facts = {"linears": records, "seconds": round(self._since - before, 3)}
                entries.append(journal.record(index, self.writer.shard_path(index), facts))

        return write

    def finish(self) -> None:
        """Everything else that makes the shards a model."""
        self.writer.finish(self.checkpoint, self.quantization_config())

    def warn_about(self, entries: list[dict[str, Any]]) -> None:
        """Say what happened that the user did not ask for; resumed blocks included."""
        asked = getattr(self.job.solver, "damp", None)
        for record in (record for entry in entries for record in entry["linears"]):
            if record["damp"] is not None and record["damp"] != asked:
                self.warnings.append(f"`{record['name']}`: damping was raised from {asked:g} to {record['damp']:g}")
            if (record["output_error"] or 0.0) > LARGE_ERROR:
                self.warnings.append(f"`{record['name']}`: {record['output_error']:.0%} of the output is lost")
        for warning in self.warnings:
            self.emit(Event("warning", warning))

    def _solve(self, block: Block) -> dict[str, Made]:
        """Solve all groups of a block, each as soon as what it reads is known."""
        made: dict[str, Made] = {}
        self.begin(block)
        for group in block.groups(staged=self.job.solver.staged):
            if not group.names:
                continue
            self.emit(Event("progress", group.names[-1]))
            for name, each in self.solve(group).items():
                made[name] = each
                group.replace(name, each.weight)
        return self.settle(block, made)

    def _restore(self, block: Block) -> None:
        """Put the weights of a finished block in place and move the activations past it."""
        written = load_file(self.writer.shard_path(block.index))
        for group in block.all_groups():
            for name in group.names:
                stored = {suffix: written[f"{name}.{suffix}"] for suffix in self.suffixes}
                group.replace(name, self.restored(stored, group.weight(name)))
        block.skip()

    def _untouched(self, prefix: str, made: set[str]) -> dict[str, Tensor]:
        """All tensors of a block that are as they were."""
        names = [n for n in self.checkpoint.names() if n.startswith(prefix) and n.removesuffix(".weight") not in made]
        return {name: self.checkpoint.read(name) for name in names}

    def _rest(self) -> dict[str, Tensor]:
        """Everything that belongs to no block: embeddings, final norm, head."""
        blocks = tuple(self.inventory.family.block_prefix(i) for i in range(self.inventory.blocks))
        return {name: self.checkpoint.read(name) for name in self.checkpoint.names() if not name.startswith(blocks)}


def record_of(name: str, shape: tuple[int, int], *, output: float | None, weight: float, damp: float | None) -> dict[str, Any]:
    """What the manifest says about one linear; a solution that is not finite stops the run here."""
    if not math.isfinite(output or 0.0) or not math.isfinite(weight):
        raise NumericalError(
            f"`{name}`: the solution is not finite", hint="try a higher `--damp`, or leave it out with `--ignore`"
        )
    return {
        "name": name,
        "shape": list(shape),
        "output_error": None if output is None else float(f"{output:.6g}"),
        "weight_error": float(f"{weight:.6g}"),
        "damp": damp,
    }
