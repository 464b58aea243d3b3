"""Stage `finetune`: a pruned model learns from the original, its teacher, and keeps its zeros.

Knowledge distillation: on each text the student is to predict what the teacher predicts, and to have the hidden states that the
teacher has. What is trained are the kept weights of the 2:4 linears, the norms and biases; embeddings and head stay the
original's. The result is again a dense checkpoint of the original's type with exactly the same zeros, ready for
`quantize --sparsity keep`. A run that is killed continues from its last saved state, on one CPU with the same bytes in the end.

The mathematics is in `marlin_tools/training/`. `torchrun` runs this same function in several processes.
"""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from marlin_tools.backends.fill import fill
from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.journal import Journal, fingerprint_of
from marlin_tools.checkpoint.manifest import history, holds, write_manifest
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.checkpoint.writer import ModelWriter
from marlin_tools.data.calibrate import CalibrationSettings
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import describe_device, pick_device, processes
from marlin_tools.distributed.team import Team
from marlin_tools.errors import DataError, ModelError, RecipeError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.quantized import is_2_4
from marlin_tools.stage import Outlook, Stage, StagePlan, Work
from marlin_tools.stream.inventory import Inventory, take_linears
from marlin_tools.training.compressed import with_mask_of
from marlin_tools.training.loop import Trainer, TrainingSettings
from marlin_tools.training.parallel import shard, training_team
from marlin_tools.training.sample import sample
from marlin_tools.training.student import Reader, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REVISION = 1
"""Raised when the same inputs would give other weights, so that old unfinished runs are not continued."""

_STATE = "training.safetensors"
_SAMPLED = "sampled.safetensors"


class FinetuneSettings(TrainingSettings, Stage):
    """How to learn, and from whom; what else there is to choose is in `training.loop.TrainingSettings`.

    sampled   windows that the teacher writes itself, besides the text given or instead of it
    seqlen    their length
    device    auto, cpu, cuda or cuda:N; with `torchrun` each process has a GPU of its own
    teacher   the original model: a directory, a hub id or an alias; in a recipe by default the recipe's model
    text      what to learn from, in a recipe by default the calibration text
    """

    remakes: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    stage: Literal["finetune"] = "finetune"
    sampled: int = Field(0, ge=0)
    seqlen: int = Field(1024, ge=2)
    device: str = "auto"
    teacher: str | None = None
    text: CalibrationSettings | None = None

    @property
    def makes(self) -> tuple[str, ...]:
        """One model in 16 bits."""
        return ("finetuned",)

    @property
    def needs_data(self) -> bool:
        """Whether it looks at the calibration text: not if it has a text of its own, or the teacher writes one."""
        return self.text is None and not self.sampled

    def plan(self, outlook: Outlook) -> StagePlan:
        """Refuse two models that cannot be compared, and one that has nothing to keep."""
        name = self.teacher or outlook.model.origin
        check_pair(outlook.model, outlook.find(name), self)
        if outlook.first and not isinstance(outlook.model, Card):
            check_mask(outlook.model)
        facts = [("teacher", name)]
        if text := self.text or (outlook.text if self.needs_data else None):
            facts.append(("text", f"{text.num_samples} samples of `{text.source}`"))
        if self.sampled:
            facts.append(("written by the teacher", f"{self.sampled} windows of {self.seqlen} tokens"))
        facts.append(("training", f"{self.tokens:,} tokens, {self.batch} sequences a step"))
        return StagePlan(tuple(facts))

    def run(self, work: Work) -> dict[str, Any]:
        """Train the model into the one directory that there is."""
        with work.clock("calibrate and finetune", work.output, device=self.device):
            tokens = work.tokens(self.text or (work.text if self.needs_data else None))
            settings = self.model_copy(update={"teacher": self.teacher or work.original})
            finetune(work.model, tokens, settings, work.output, emit=work.emit, overwrite=work.overwrite, resume=work.resume)
        return {}


@dataclass(frozen=True)
class FinetunePlan:
    """What is known before the work begins. `sparse` are the linears that are 2:4 and will stay it."""

    student: Checkpoint
    teacher: Checkpoint
    inventory: Inventory
    sparse: frozenset[str]


def plan_finetune(model: str | Path | Checkpoint, settings: FinetuneSettings) -> FinetunePlan:
    """Check that the two belong together and that there is something to keep, before any work."""
    if settings.teacher is None:
        raise ValueError("finetuning needs a teacher")
    student, teacher = Checkpoint.open(model, accept=find_family), Checkpoint.open(settings.teacher, accept=find_family)
    check_pair(student, teacher, settings)
    check_mask(student)
    inventory = take_linears(student, ())
    return FinetunePlan(student, teacher, inventory, frozenset(_sparse_linears(inventory)))


def check_mask(student: Checkpoint) -> None:
    """Refuse a model without zeros to keep; reads no further than the first linear that has them."""
    if next(_sparse_linears(take_linears(student, ())), None) is None:
        raise ModelError(
            f"`{student.origin}` has no 2:4 sparse linear, so there is no mask to keep",
            hint="prune it first: `marlin-tools prune`",
        )


def _sparse_linears(inventory: Inventory) -> Iterator[str]:
    return (target.name for target in inventory.targets if is_2_4(inventory.weight(target.name)))


def check_pair(student: Checkpoint, teacher: Checkpoint, settings: FinetuneSettings) -> None:
    """Refuse settings that cannot work and two models that cannot be compared, from their configurations alone."""
    _check_learning(settings)
    if teacher.quantization is not None:
        raise ModelError(f"teacher `{teacher.origin}` is quantised", hint="learn from the original model")
    check_vocabulary(student, teacher)
    if settings.square_head:
        for key in ("hidden_size", "num_hidden_layers"):
            if student.config.get(key) != teacher.config.get(key):
                raise ModelError(
                    f"`{key}` is {student.config.get(key)} in `{student.origin}` and {teacher.config.get(key)} in its teacher",
                    hint="hidden states cannot be compared: set `square_head` to 0",
                )


def _check_learning(settings: FinetuneSettings) -> None:
    if not settings.kl and not settings.ce and not settings.square_head:
        raise RecipeError("`kl`, `ce` and `square_head` are all 0", hint="at least one loss must count")
    if settings.batch % (settings.micro * processes()):
        raise RecipeError(
            f"`batch` {settings.batch} is not a multiple of `micro` {settings.micro} times {processes()} processes",
            hint="choose `batch` and `micro` so that every process gets whole micro-batches",
        )


def check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Probabilities can only be compared if every token id means the same."""
    sizes = [int(each.config.get("vocab_size", 0)) for each in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"teacher `{teacher.origin}` has a vocabulary of {sizes[1]} tokens, `{student.origin}` one of {sizes[0]}",
            hint="the teacher must be the model that was pruned, or one with the same tokenizer",
        )
    files = [each.path / "tokenizer.json" for each in (student, teacher)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        words = [each.tokenizer().get_vocab() for each in (student, teacher)]
        if words[0] != words[1]:
            raise ModelError(
                f"the tokenizers of `{student.origin}` and its teacher `{teacher.origin}` number their tokens differently",
                hint="the teacher must be the model that was pruned, or one with the same tokenizer",
            )


def finetune(
    model: str | Path | Checkpoint,
    tokens: TokenSet | None,
    settings: FinetuneSettings,
    out: str | Path,
    *,
    emit: Emit = silent,
    overwrite: bool = False,
    resume: bool = True,
) -> Checkpoint:
    """Train `model`, with its 2:4 zeros, to do what its teacher does on `tokens`; the result goes to the directory `out`."""
    if tokens is None and not settings.sampled:
        raise ValueError("training needs tokens, given or sampled")
    with training_team(pick_device(settings.device)) as team:
        say = emit if team.leads else silent
        say(Event("stage", "finetune"))
        plan = plan_finetune(model, settings)
        _check_sizes(tokens, settings)
        run = fingerprint_of(
            stage="finetune",
            revision=REVISION,
            model=plan.student.fingerprint,
            teacher=plan.teacher.fingerprint,
            tokens=tokens.fingerprint if tokens else None,
            settings=settings.model_dump(exclude={"stage", "device", "teacher", "text", "saves"}),
            device=team.device.type,
            torch=torch.__version__,
        )
        if not overwrite and holds(Path(out), run):
            say(Event("note", f"`{out}` already holds this result; nothing to do"))
            return Checkpoint.open(out)
        sources = plan.student.path, plan.teacher.path
        output = OutputDirectory(out, overwrite=overwrite, resume=resume, sources=sources)
        with output if team.leads else nullcontext():
            if team.leads:
                Journal(output, run)
            team.wait()
            work = _Work(plan, settings, team, output, say)
            work.run(tokens, run)
            team.wait()
        return Checkpoint.open(out)


def _check_sizes(tokens: TokenSet | None, settings: FinetuneSettings) -> None:
    """Everything about amounts that would otherwise come out in the middle of training."""
    if tokens is not None and not tokens.packed:
        raise DataError("training reads windows of one length, these are documents", hint="use `shape: packed`, or `--seqlen`")
    if tokens is not None and settings.sampled and tokens.longest != settings.seqlen:
        raise DataError(
            f"the text has windows of {tokens.longest} tokens, the teacher would write {settings.seqlen}",
            hint="make `seqlen` equal",
        )
    count = (len(tokens.sequences) if tokens else 0) + settings.sampled
    if count <= settings.held_out:
        raise DataError(
            f"{count} windows of text, of which {settings.held_out} are held out", hint="use more text (`--num-samples`)"
        )


class _Work:
    """One run of the stage."""

    def __init__(self, plan: FinetunePlan, settings: FinetuneSettings, team: Team, output: OutputDirectory, emit: Emit) -> None:
        self.plan, self.settings, self.team, self.output, self.emit = plan, settings, team, output, emit
        self.family = plan.inventory.family

    def run(self, tokens: TokenSet | None, fingerprint: str) -> None:
        """Train, write, publish."""
        begin = time.perf_counter()
        teacher = self._model(self.plan.teacher, self._teaching_type())
        text = self._text(tokens, teacher)
        every = self.settings.every if self.settings.square_head else 0
        student = Student(self._model(self.plan.student, torch.float32), self.family, every, self.plan.sparse)
        if self.settings.recompute:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
            student.model.train()
        shard(self.team, student.decoder, student.blocks)
        windows = torch.stack(text.sequences)
        held_out = windows[len(windows) - self.settings.held_out :]
        train = windows[: len(windows) - self.settings.held_out]
        trainer = Trainer(student, Reader(teacher, self.family, every), (train, held_out), self.settings, self.team)
        self._go_on(trainer)
        trainer.run(self.emit, lambda: self._save(trainer))
        self._write(student)
        if self.team.leads:
            self._publish(trainer, text, fingerprint, time.perf_counter() - begin)

    def _teaching_type(self) -> torch.dtype:
        """The teacher computes in its own type; on a CPU in float32."""
        return torch.float32 if self.team.device.type == "cpu" else self.plan.teacher.dtype

    def _model(self, checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
        return fill(skeleton(checkpoint, dtype), checkpoint, None, _no_linear, self.team.device, silent)

    def _text(self, tokens: TokenSet | None, teacher: "PreTrainedModel") -> TokenSet:
        """What is given, and what the teacher writes; that is written once and kept with the state."""
        if not self.settings.sampled:
            assert tokens is not None, "no text at all"
            return tokens
        kept = self.output.state / _SAMPLED
        if self.team.leads and not kept.is_file():
            written = sample(
                teacher, self.plan.teacher, self.settings.sampled, self.settings.seqlen, self.settings.seed, self.emit
            )
            written.save(kept)
        self.team.wait()
        written = TokenSet.load(kept)
        if tokens is None:
            return written
        both = f"{tokens.source} and {written.source}"
        return TokenSet(
            (*written.sequences, *tokens.sequences), both, packed=True, documents=tokens.documents, seed=tokens.seed
        )

    def _go_on(self, trainer: Trainer) -> None:
        """Continue from the last saved state, if there is one."""
        saved = self.output.state / _STATE
        if saved.is_file():
            tensors = load_file(saved)
            facts = json.loads(bytes(tensors.pop("facts").tolist()))
            trainer.restore(tensors, facts)
            self.emit(Event("note", f"continuing at step {trainer.step} of {trainer.steps}"))

    def _save(self, trainer: Trainer) -> None:
        """All of the state in one file, which is replaced at once or not at all."""
        state = dict(trainer.state())
        if self.team.leads:
            facts = json.dumps(trainer.facts()).encode()
            self.output.write_state_tensors(_STATE, {**state, "facts": torch.tensor(list(facts), dtype=torch.uint8)})

    def _write(self, student: Student) -> None:
        """The checkpoint: what was trained in the types in which it was stored, everything else as it was."""
        source = self.plan.student
        blocks = [self.family.block_prefix(index) for index in range(self.plan.inventory.blocks)]
        writer = ModelWriter(self.output, shards=len(blocks) + 1)
        left = set(source.names())
        for index, prefix in enumerate([*blocks, ""]):
            trained = dict(student.tensors(prefix))
            names = sorted(name for name in left if name.startswith(prefix))
            left -= set(names)
            if self.team.leads:
                writer.write_shard(index, dict(self._stored(names, trained)))
        if self.team.leads:
            writer.finish(source, None)

    def _stored(self, names: list[str], trained: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            old = self.plan.student.read(name)
            if name not in trained:
                yield name, old
            elif name.removesuffix(".weight") in self.plan.sparse:
                yield name, with_mask_of(old, trained[name])
            else:
                yield name, trained[name].to(old.dtype)

    def _publish(self, trainer: Trainer, text: TokenSet, fingerprint: str, seconds: float) -> None:
        """Manifest, and the directory under its final name."""
        plan = self.plan
        first, last = trainer.measured[0][1], trainer.measured[-1][1]
        facts = {
            "fingerprint": fingerprint,
            "model": {"origin": plan.student.origin, "fingerprint": plan.student.fingerprint},
            "teacher": {"origin": plan.teacher.origin, "fingerprint": plan.teacher.fingerprint},
            "calibration": text.describe(),
            "settings": self.settings.model_dump(mode="json", exclude={"stage", "text"}),
            "sparsity": "2:4",
            **history(plan.student.path),
            "processes": self.team.size,
            "device": describe_device(self.team.device),
            "steps": trainer.steps,
            "held_out_kl": trainer.measured,
            "linears": [{"name": name} for name in sorted(plan.sparse)],
            "kept": plan.inventory.kept,
        }
        write_manifest(self.output, "finetune", facts, {"seconds": round(seconds, 2)}, [])
        self.output.publish()
        said = f"finetune: held-out KL {first:.4f} -> {last:.4f} after {trainer.steps} steps, into `{self.output.out}`"
        self.emit(Event("result", said, data={"seconds": seconds, "held_out_kl": trainer.measured}))


def _no_linear(_linear: Any, _bias: Tensor | None, _device: torch.device, _dtype: torch.dtype) -> nn.Module:
    raise AssertionError("the model is not quantised")
