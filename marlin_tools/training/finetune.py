"""Stage `finetune`: a compressed model learns from the original, its teacher, and keeps its zeros or its codes.

Knowledge distillation: on each text the student is to predict what the teacher predicts, and to have the hidden states that
the teacher has. Embeddings and head stay the original's; norms and biases learn, and

    of a pruned model     the kept weights of its 2:4 linears. The result is a dense checkpoint of the original's type with
                          exactly the same zeros, ready for `quantize --sparsity keep`
    of a quantised model  scales and codes, each code by one step at most; zeros of 2:4 codes stay. The result has the same
                          format

The result is the state that did best on what was not trained on. A run that is killed continues from its last saved state, on
one CPU with the same bytes in the end.

The mathematics is in `marlin_tools/training/`. `torchrun` runs this same function in several processes.
"""

import json
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from marlin_tools.backends.fill import fill
from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.contract import text_config
from marlin_tools.checkpoint.journal import Journal, fingerprint_of
from marlin_tools.checkpoint.manifest import history, holds, write_manifest
from marlin_tools.checkpoint.output import OutputDirectory, check_space, gigabytes
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.writer import ModelWriter, check_companions
from marlin_tools.data.calibrate import CalibrationSettings, expected_tokens
from marlin_tools.data.tokens import TokenSet, check_arguments
from marlin_tools.distributed.device import DeviceName, describe_device, pick_device
from marlin_tools.distributed.team import Team
from marlin_tools.errors import DataError, DeviceError, counted
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.families.experts import shell
from marlin_tools.formats.config import activations_of
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.settings import ModelName
from marlin_tools.stage import Outlook, Stage, StagePlan, Work, made_with
from marlin_tools.training.compressed import with_mask_of
from marlin_tools.training.disk import needed_gb, trained_bytes
from marlin_tools.training.loop import Trainer, TrainingSettings
from marlin_tools.training.pair import Pair, another_teacher, check_mask, check_pair, pair
from marlin_tools.training.parallel import shard, training_team
from marlin_tools.training.sample import sample
from marlin_tools.training.scaled import ScaledLinear, free_codes, read_rounded
from marlin_tools.training.student import Reader, Student, recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REVISION = 10
"""Raised when the same inputs would give other weights, so that old unfinished runs are not continued."""

_SMALLER = (
    "`finetune` has `--recompute`, a smaller `--micro`, `--code-rate 0` for a quantised model, and `torchrun` for several GPUs"
)

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
    device: DeviceName = "auto"
    teacher: ModelName | None = None
    text: CalibrationSettings | None = None

    @property
    def makes(self) -> tuple[str, ...]:
        """One model, stored as the one that it reads."""
        return ("finetuned",)

    @property
    def needs_data(self) -> bool:
        """Whether it looks at the calibration text: not if it has a text of its own, or the teacher writes one."""
        return self.text is None and not self.sampled

    @property
    def decides(self) -> dict[str, Any]:
        """What two runs cannot differ in and have one result, beside model, teacher and text."""
        return self.model_dump(exclude={"stage", "device", "teacher", "text", "saves"})

    def reads(self, text: CalibrationSettings | None) -> CalibrationSettings | None:
        """A text of its own comes first."""
        return self.text or super().reads(text)

    def differs(self, before: Stage) -> bool:
        """Whether anything of it is another; what nobody chose may be what was chosen elsewhere."""
        if not isinstance(before, FinetuneSettings):
            return False
        pairs = ((value, before.decides[key]) for key, value in self.decides.items())
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def plan(self, outlook: Outlook) -> StagePlan:
        """Refuse two models that cannot be compared, and one that has nothing to keep."""
        name = outlook.model.origin if self.teacher is None else self.teacher
        quantized = outlook.quantized or outlook.model.quantization is not None
        teacher = outlook.find(name)
        check_pair(outlook.model, teacher, self, quantized=quantized)
        _check_window(teacher, self)
        if outlook.first and outlook.model.quantization is None and not isinstance(outlook.model, Card):
            check_mask(outlook.model)
        facts = [("teacher", name)]
        if text := self.reads(outlook.text):
            expected_tokens(text, teacher)  # refuses windows that the model does not have
            facts.append(("text", f"{counted(text.num_samples, 'sample')} of `{text.source}`"))
        if self.sampled:
            facts.append(("written by the teacher", f"{counted(self.sampled, 'window')} of {self.seqlen} tokens"))
        how = self.fitted(quantized=quantized)
        facts.append(("training", f"{how.tokens:,} tokens, {counted(self.batch, 'sequence')} a step"))
        if outlook.first and not outlook.quantized and outlook.dry and not isinstance(outlook.model, Card):
            facts.append(("disk", gigabytes(needed_gb(outlook.model, trained_bytes(outlook.model, how), how))))
        if outlook.quantized:
            facts.append(("stored as", f"`{outlook.formats[0]}`, as the model before it has learned, which stays"))
        return StagePlan(tuple(facts))

    def foresee(self, work: Work) -> None:
        """A text that is too short to hold some of it out."""
        _check_sizes(work.foreseen(self.reads(work.text)), self)

    def run(self, work: Work) -> dict[str, Any]:
        """Train the model into the one directory that there is."""
        with work.clock("finetune", work.output, device=self.device):
            tokens = work.tokens(self.reads(work.text))
            settings = self.model_copy(update={"teacher": work.original if self.teacher is None else self.teacher})
            finetune(work.model, tokens, settings, work.output, emit=work.emit, overwrite=work.overwrite, resume=work.resume)
        return {}


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
    """Train a compressed model to do what its teacher does on `tokens`; the result goes to the directory `out`."""
    check_arguments(settings, FinetuneSettings, tokens)
    if settings.teacher is None:
        raise ValueError("finetuning needs a teacher")
    if tokens is None and not settings.sampled:
        raise ValueError("training needs tokens, given or sampled")
    with training_team(pick_device(settings.device)) as team:
        say = emit if team.leads else silent
        say(Event("stage", "finetune"))
        plan = pair(model, settings.teacher, settings)
        if said := another_teacher(plan.student, plan.teacher):
            say(Event("warning", said))
        settings = settings.fitted(quantized=plan.stored is not None)
        check_companions(plan.student)
        _check_sizes(tokens, settings)
        _check_window(plan.teacher, settings)
        run = fingerprint_of(
            stage="finetune",
            revision=REVISION,
            model=plan.student.fingerprint,
            teacher=plan.teacher.fingerprint,
            tokens=tokens.fingerprint if tokens else None,
            settings=settings.decides,
            device=team.device.type,
            torch=torch.__version__,
        )
        if team.decide(choice=team.leads and not overwrite and holds(Path(out), run)):
            say(Event("note", f"`{out}` already holds this result; nothing to do"))
            return Checkpoint.open(out)
        sources = plan.student.path, plan.teacher.path
        output = OutputDirectory(out, overwrite=overwrite, resume=resume, sources=sources)
        with output if team.leads else nullcontext():
            if team.leads:
                Journal(output, run, made_with(settings, tokens))
            team.wait()
            try:
                with team.talking():
                    _Work(plan, settings, team, output, say).run(tokens, run)
            except torch.OutOfMemoryError as error:
                raise DeviceError(f"training does not fit into the memory of {team.device}", hint=_SMALLER) from error
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
        all_of_it = tokens is not None and settings.text is not None and settings.text.fewer
        more = "" if all_of_it else f"`{'--num-samples' if tokens else '--sampled'} {settings.held_out + 1}` or more"
        raise DataError(
            f"{counted(count, 'window')} of text, of which {settings.held_out} are held out",
            hint="use " + ", ".join(filter(None, (more, "a longer text, or a smaller `--seqlen`" if tokens else ""))),
        )


def _check_window(teacher: Checkpoint, settings: FinetuneSettings) -> None:
    """Refuse windows that are longer than what the teacher can write."""
    longest = text_config(teacher.config).get("max_position_embeddings")
    if settings.sampled and longest and settings.seqlen > longest:
        raise DataError(
            f"windows of {settings.seqlen} tokens are more than the {longest} positions of `{teacher.origin}`",
            hint=f"use `--seqlen {longest}`",
        )


class _Work:
    """One run of the stage."""

    def __init__(self, plan: Pair, settings: FinetuneSettings, team: Team, output: OutputDirectory, emit: Emit) -> None:
        self.plan, self.settings, self.team, self.output, self.emit = plan, settings, team, output, emit
        self.family = plan.layout.family

    def run(self, tokens: TokenSet | None, fingerprint: str) -> None:
        """Train, write, publish."""
        begin = time.perf_counter()
        original = find_family(self.plan.teacher.config)
        teacher = self._model(self.plan.teacher, torch.float32 if self.team.device.type == "cpu" else self.plan.teacher.dtype)
        text = self._text(tokens, teacher)
        every = self.settings.every if self.settings.square_head else 0
        model = self._model(self.plan.student, torch.float32, self.plan.stored)
        if self.settings.code_rate:
            free_codes(model.get_submodule(self.family.decoder), teacher.get_submodule(original.decoder))
        if activations_of(self.plan.student.quantization) == "fp8":
            read_rounded(model)
        student = Student(model, self.family, every, self._sparse_modules(model))
        if self.settings.recompute:
            recompute(student)
        shard(self.team, student.decoder, student.blocks)
        windows = torch.stack(text.sequences)
        held_out = windows[len(windows) - self.settings.held_out :]
        train = windows[: len(windows) - self.settings.held_out]
        trainer = Trainer(student, Reader(teacher, original, every), (train, held_out), self.settings, self.team)
        if (rounds := trainer.steps * self.settings.batch / len(train)) >= 1.5:
            are = "window is" if len(train) == 1 else "windows are"
            said = f"{len(train)} {are} read {rounds:.1f} times; more text might teach it more"
            self.emit(Event("note", said))
        self._check_space(trainer)
        self._go_on(trainer)
        trainer.run(self.emit, lambda: self._save(trainer))
        self._write(student)
        if self.team.leads:
            self._publish(trainer, text, fingerprint, time.perf_counter() - begin)

    def _model(self, checkpoint: Checkpoint, dtype: torch.dtype, stored: StoredLinears | None = None) -> "PreTrainedModel":
        def learning(weight: QuantizedLinear, bias: Any, device: torch.device, _dtype: torch.dtype) -> nn.Module:
            return ScaledLinear(weight.to(device), bias, checkpoint.dtype)

        return fill(shell(checkpoint, dtype), checkpoint, stored, learning, self.team.device, silent)

    def _sparse_modules(self, model: "PreTrainedModel") -> frozenset[str]:
        """The sparse linears by the names of their modules; in a checkpoint they may have others."""
        places = ((name, self.plan.layout.place(f"{name}.weight").tensor) for name, _ in model.named_modules())
        return frozenset(name for name, tensor in places if tensor.removesuffix(".weight") in self.plan.sparse)

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

    def _check_space(self, trainer: Trainer) -> None:
        """Refuse what would end at a full disk."""
        saved = (self.output.state / _STATE).is_file()
        check_space(self.output.out, needed_gb(self.plan.student, trainer.trained_bytes, self.settings, saved=saved))

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
        if not self.team.leads:
            deque(trainer.state(), maxlen=0)  # asked for with the others, and not kept
            return
        state = dict(trainer.state())
        facts = json.dumps(trainer.facts()).encode()
        self.output.write_state_tensors(_STATE, {**state, "facts": torch.tensor(list(facts), dtype=torch.uint8)})

    def _write(self, student: Student) -> None:
        """The checkpoint: what was trained in the types in which it was stored, everything else as it was."""
        source, family, layout = self.plan.student, self.family, self.plan.layout
        writer = ModelWriter(self.output, shards=layout.blocks + 1)
        left = set(source.names())
        for index in range(layout.blocks + 1):
            lies = "" if index == layout.blocks else family.block_prefix(index)
            names = sorted(name for name in left if name.startswith(lies))
            part = index if index < layout.blocks else None
            trained = self._packed(student, part) | {layout.place(name).tensor: t for name, t in student.tensors(part)}
            left -= set(names)
            if self.team.leads:
                writer.write_shard(index, {name: self._stored(name, trained.get(name)) for name in names})
        if self.team.leads:
            writer.finish(source, source.quantization)

    def _packed(self, student: Student, block: int | None) -> dict[str, Tensor]:
        """The stored tensors of all quantised linears of a block, or of none."""
        found: dict[str, Tensor] = {}
        for name, linear in student.quantized_linears(block):
            assert self.plan.stored is not None
            stored = self.plan.layout.place(f"{name}.weight").tensor.removesuffix(".weight")
            packed = self.plan.stored.format.pack(linear, self.plan.student.dtype)
            found |= {f"{stored}.{suffix}": tensor for suffix, tensor in packed.items()}
        return found

    def _stored(self, name: str, trained: Tensor | None) -> Tensor:
        """What the result holds under this name."""
        source = self.plan.student
        if trained is None:
            return source.read(name)
        if name.removesuffix(".weight") in self.plan.sparse:
            return with_mask_of(source.read(name), trained)
        return trained.to(source.stored(name).dtype)

    def _publish(self, trainer: Trainer, text: TokenSet, fingerprint: str, seconds: float) -> None:
        """Manifest, and the directory under its final name."""
        plan = self.plan
        first, best = trainer.measured[0][1], dict(trainer.measured)[trainer.best_step]
        facts = {
            "fingerprint": fingerprint,
            "model": {"origin": plan.student.origin, "fingerprint": plan.student.fingerprint},
            "teacher": {"origin": plan.teacher.origin, "fingerprint": plan.teacher.fingerprint},
            "calibration": text.describe(),
            "settings": self.settings.model_dump(mode="json", exclude={"stage", "text"}),
            **plan.facts,
            **history(plan.student.path),
            "processes": self.team.size,
            "device": describe_device(self.team.device),
            "steps": trainer.steps,
            "best_step": trainer.best_step,
            "held_out_kl": trainer.measured,
        }
        warnings = [said for said in (another_teacher(plan.student, plan.teacher), trainer.stopped) if said]
        write_manifest(self.output, "finetune", facts, {"seconds": round(seconds, 2)}, warnings)
        self.output.publish()
        if trainer.best_step == 0:
            self.emit(Event("note", "nothing was learned that helps on other text: try more of it, or another `--rate`"))
        after = f"after {counted(trainer.best_step, 'step')}, into `{self.output.out}`"
        said = f"finetune: held-out KL {first:.4f} -> {best:.4f} {after}"
        self.emit(Event("result", said, data={"seconds": seconds, "held_out_kl": trainer.measured}))
