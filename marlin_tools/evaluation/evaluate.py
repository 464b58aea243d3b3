"""Stage `evaluate`: what a model still knows, and what compression has cost it beside the original.

    evaluate("runs/llama2-7b-int4", EvaluateSettings(tasks=("mmlu", "ppl:wikitext2")), baseline="llama2-7b")

`ppl:...` names a text, whose token perplexity is measured as in the Marlin paper (`perplexity.py`); all other names are lm-eval
tasks (`harness.py`). Both models run through the same backends with the same code in the same process. Names, files and lengths
are checked before any model is loaded. Read next: `scores.py` for what comes out.
"""

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from marlin_tools.backends import BACKENDS, check_activations, load
from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.manifest import versions
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.evaluation import evaluation_documents, find_text
from marlin_tools.data.render import Encoder, leave_open
from marlin_tools.data.tokens import TokenSet, check_arguments
from marlin_tools.distributed.device import DeviceName, free_memory
from marlin_tools.errors import DataError, DeviceError, RecipeError, counted
from marlin_tools.evaluation.perplexity import Traces, score_text, tokens_per_batch, trace
from marlin_tools.evaluation.scores import Evaluation, Score
from marlin_tools.events import Emit, Event, silent
from marlin_tools.formats import find_format
from marlin_tools.formats.config import activations_of
from marlin_tools.quantized import ActivationType, dtype_name
from marlin_tools.settings import Folder, Settings, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from marlin_tools.evaluation.harness import Harness
    from marlin_tools.evaluation.task_index import Tasks

WINDOW = 4096
"""Length of perplexity windows when nobody names one and the model has as many positions."""

ITEM_TOKENS = 1024
"""How long the items of a task are assumed to be when a batch size is chosen."""

MAX_BATCH = 64


class EvaluateSettings(Settings):
    """What to measure, and on what.

    tasks         lm-eval tasks, groups and tags; `ppl:wikitext2`, `ppl:redpajama`, `ppl:demo` or `ppl:FILE` for texts
    num_fewshot   examples before each question; None is the task's own number
    limit         only the first so many items of a task and sequences of a text; below 1 a share of them
    batch_size    items per forward; `auto` is chosen from the free memory and halved when it runs out
    seqlen        window of the perplexity; by default 4096, or the model's positions if it has fewer
    include_path  directories with lm-eval tasks of your own
    allow_task_code  whether functions and scripts of those tasks may run
    backend       what runs the quantised linears: a name in `backends.BACKENDS`; or `vllm`, which runs all of both models
    activations   what the quantised linears read, "fp8" or "16bit", if not what the model says; the baseline is left alone
    device        auto, cpu, cuda or cuda:N
    seed          of everything that lm-eval draws, above all the few-shot examples
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: float | None = Field(default=None, gt=0)
    batch_size: Literal["auto"] | int = Field(default="auto")
    seqlen: int | None = Field(default=None, ge=2)
    include_path: tuple[Folder, ...] = ()
    allow_task_code: bool = False
    backend: Annotated[str, one_of("backend", ("auto", *BACKENDS, "vllm"))] = "auto"
    activations: ActivationType | None = None
    device: DeviceName = "auto"
    seed: int = Field(default=1234, ge=0, lt=2**32)

    @field_validator("tasks")
    @classmethod
    def _named(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not all(task.strip().removeprefix("ppl:") for task in tasks):
            raise ValueError("a task without a name; for example `ppl:wikitext2,mmlu`")
        return tuple(task.strip() for task in tasks)

    @field_validator("limit")
    @classmethod
    def _whole_or_a_share(cls, limit: float | None) -> float | None:
        if limit is not None and limit > 1 and limit % 1:
            raise ValueError(f"a number of items, or a share below 1, not {limit:g}")
        return limit

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, size: Literal["auto"] | int) -> Literal["auto"] | int:
        if size != "auto" and size < 1:
            raise ValueError(f"batch_size is `auto` or at least 1, not {size}")
        return size

    @property
    def texts(self) -> list[str]:
        """The names that stand for texts, each once."""
        return [name for name in dict.fromkeys(self.tasks) if name.startswith("ppl:")]

    @property
    def questions(self) -> list[str]:
        """The names that are lm-eval's business, each once."""
        return [name for name in dict.fromkeys(self.tasks) if not name.startswith("ppl:")]


def evaluate(
    model: str | Path | Checkpoint,
    settings: EvaluateSettings,
    *,
    baseline: str | Path | Checkpoint | None = None,
    emit: Emit = silent,
) -> Evaluation:
    """Score a model on every task, beside `baseline` if one is given."""
    check_arguments(settings, EvaluateSettings, None)
    emit(Event("stage", "evaluate"))
    begin = time.perf_counter()
    notes: list[str] = []

    def remember(event: Event) -> None:
        if event.kind == "warning":
            notes.append(event.text)
        emit(event)

    checkpoint = Checkpoint.open(model)
    original = Checkpoint.open(baseline) if baseline is not None else None
    run = _Run(settings, checkpoint, original, remember)
    # as the user named the tasks; the parts of groups and tags follow in lm-eval's order
    place = {name: number for number, name in enumerate(settings.tasks)}
    scores = tuple(sorted(run.scores(), key=lambda score: place.get(score.task, len(place))))
    for score in scores:
        if not math.isfinite(score.value):
            told = f"`{score.task}`: {score.metric} is not finite; `marlin-tools verify` says whether the weights are"
            remember(Event("warning", told))
    result = Evaluation(
        scores=scores,
        model=run.subject.describe(),
        baseline=run.original.describe() if run.original is not None else None,
        settings=settings.model_dump(mode="json", exclude={"stage", "baseline"}),
        versions=versions(),
        notes=tuple(dict.fromkeys([*run.code, *notes])),
        seconds=time.perf_counter() - begin,
    )
    emit(Event("result", counted(len(result.scores), "score"), data=result.describe()))
    return result


def check_asked(settings: EvaluateSettings, checkpoint: Checkpoint) -> None:
    """Refuse what contradicts itself, a window that the model has not, and texts that are not there."""
    if settings.activations and settings.backend == "vllm":
        raise RecipeError(
            "backend `vllm` rounds activations as config.json says",
            hint="leave `--activations` out, or use another `--backend`",
        )
    if settings.backend == "vllm" and settings.device not in {"auto", "cuda", "cuda:0"}:
        raise RecipeError(
            f"backend `vllm` computes on the first GPU that it sees, not on `{settings.device}`",
            hint="leave `--device` out and choose one with CUDA_VISIBLE_DEVICES, or use another `--backend`",
        )
    for name in settings.texts:
        _window(settings, checkpoint)
        find_text(name.removeprefix("ppl:"))


def check_vocabulary(model: Checkpoint, original: Checkpoint) -> None:
    """Predictions can be compared word by word only if both models mean the same words; a card has no words, only a number."""
    sizes = model.text_config["vocab_size"], original.text_config["vocab_size"]
    if sizes[0] != sizes[1] or (model.path.is_dir() and original.tokenizer().get_vocab() != model.tokenizer().get_vocab()):
        raise DataError(
            f"the vocabularies of `{model.origin}` ({sizes[0]} words) and `{original.origin}` ({sizes[1]} words) differ",
            hint="on a text, a model can only be compared with the one that it was made from",
        )


def find_tasks(settings: EvaluateSettings) -> "Tasks | None":
    """lm-eval's tasks by their names; None if nobody asks for any."""
    if not settings.questions:
        return None
    from marlin_tools.evaluation.task_index import Tasks

    return Tasks(settings.questions, settings.include_path, allow_code=settings.allow_task_code)


def _window(settings: EvaluateSettings, checkpoint: Checkpoint) -> int:
    longest = int(checkpoint.text_config.get("max_position_embeddings") or WINDOW)
    seqlen = settings.seqlen or min(WINDOW, longest)
    if seqlen > longest:
        message = f"window length {seqlen} is more than the {longest} positions of the model"
        raise DataError(message, hint=f"use `--seqlen {longest}`")
    return seqlen


def check_data(checkpoint: Checkpoint, settings: EvaluateSettings, emit: Emit = silent) -> None:
    """Refuse tasks and texts that cannot be had, or not be read by this model, which may be quantised later."""
    _Run(settings.model_copy(update={"activations": None}), checkpoint, None, emit)


def unavailable(model: str | Path | Checkpoint, settings: EvaluateSettings, emit: Emit = silent) -> dict[str, str]:
    """The tasks whose data cannot be had here, and why; looks at one after the other only if they do not all work together."""
    checkpoint = Checkpoint.open(model)
    try:
        check_data(checkpoint, settings, emit)
    except DataError as error:
        if len(tasks := dict.fromkeys(settings.tasks)) == 1:
            return {settings.tasks[0]: error.message}
        each = (settings.model_copy(update={"tasks": (task,)}) for task in tasks)
        return {task: reason for alone in each for task, reason in unavailable(checkpoint, alone, emit).items()}
    return {}


_CLOSED = (
    "the tokenizer puts an EOS behind each text, and so lm-eval puts one behind each question: scores of tasks say little. "
    "Leave it out in tokenizer.json, or set `add_eos_token` to false in tokenizer_config.json"
)


@dataclass
class _Side:
    """One of the two models, how it was run, and what it answered."""

    checkpoint: Checkpoint
    how: Mapping[str, Any] = field(default_factory=dict)
    answers: Any = None

    def __post_init__(self) -> None:
        quantized = dequantized(self.checkpoint).quantization
        self.format = find_format(quantized).name if quantized is not None else None  # here: an unknown one is refused at once
        self.reads = activations_of(quantized) if quantized is not None else None

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "origin": self.checkpoint.origin,
            "fingerprint": self.checkpoint.fingerprint,
            "format": self.format,
            "dtype": dtype_name(self.checkpoint.dtype),
            "activations": self.reads,
            **self.how,
        }


class _Run:
    """One evaluation. Making it checks everything that can be checked without a model."""

    def __init__(self, settings: EvaluateSettings, checkpoint: Checkpoint, original: Checkpoint | None, emit: Emit) -> None:
        self.settings, self.emit = settings, emit
        check_asked(settings, checkpoint)
        check_activations(checkpoint, settings.activations)
        self.subject = _Side(checkpoint)
        self.original = _Side(original) if original is not None else None
        self.code: list[str] = []
        self.harness = self._harness()  # first: what fails most often, and loads least
        self.tokenizer = checkpoint.tokenizer()
        self.bos = Encoder(self.tokenizer).bos
        if self.harness is not None:
            leave_open(self.tokenizer)  # as that of whoever is asked will be
            if Encoder(self.tokenizer).eos:
                self.emit(Event("warning", _CLOSED))
        self.texts = {name: self._tokens(name) for name in settings.texts}
        if original is not None and self.texts:
            check_vocabulary(checkpoint, original)

    def scores(self) -> list[Score]:
        """Ask the model and the baseline, let both read the texts, and count."""
        traces = self._through_vllm() if self.settings.backend == "vllm" else self._through_torch()
        found = [
            score for name, tokens in self.texts.items() for score in score_text(name, traces[name], self._text_details(tokens))
        ]
        if self.harness is not None:
            from marlin_tools.evaluation.harness import read_scores

            common = {"bos": "as the tokenizer does: " + ("one per item" if self.bos else "none"), "seed": self.settings.seed}
            other = self.original.answers if self.original is not None else None
            found += read_scores(self.harness, self.subject.answers, other, common)
        return found

    def _through_torch(self) -> dict[str, Traces]:
        """The texts are read with both models in memory; without texts only one is there at a time."""
        model = self._load_and_ask(self.subject)
        base = None
        if self.original is not None:
            if not self.texts:
                model = None
                gc.collect()  # modules refer to each other; the memory is needed now
            base = self._load_and_ask(self.original, beside=model is not None)
        if model is None:
            return {}
        budget = tokens_per_batch(model, 1 if base is None else 2)
        return {name: trace(model, base, tokens, budget, self.emit) for name, tokens in self.texts.items()}

    def _through_vllm(self) -> dict[str, Traces]:
        """One engine after the other."""
        from marlin_tools.backends.vllm import VllmEngine, divergence

        longest = max((tokens.longest for tokens in self.texts.values()), default=0)
        sides = [side for side in (self.subject, self.original) if side is not None]
        settings, readings = self.settings, []
        how: dict[str, Any] = {
            "items": self.harness is not None,
            "batch": settings.batch_size,
            "seed": settings.seed,
            "emit": self.emit,
        }
        for side in sides:
            with VllmEngine(side.checkpoint, longest, **how) as served:
                side.how = served.how
                if self.harness is not None:
                    side.answers = self.harness.answers(served.judge, self.settings.limit, self.emit)
                readings.append({name: served.read(name, t.sequences, self.emit) for name, t in self.texts.items()})
        traces = {}
        for name, ours in readings[0].items():
            theirs = readings[1][name] if len(readings) > 1 else []
            pairs = [divergence(a, b) for a, b in zip(ours, theirs, strict=False)]
            kl, top1 = ([pair[i] for pair in pairs] for i in (0, 1))
            traces[name] = Traces([each.loss for each in ours], [each.loss for each in theirs], kl, top1)
        return traces

    def _load_and_ask(self, side: _Side, *, beside: bool = False) -> "PreTrainedModel":
        def hear(event: Event) -> None:
            if "backend" in event.data:
                side.how = event.data
            self.emit(event)

        try:
            asked = self.settings
            reads = asked.activations if side is self.subject else None
            model = load(side.checkpoint, device=asked.device, backend=asked.backend, activations=reads, emit=hear)
        except DeviceError as error:
            if not beside:
                raise
            hint = "both models read the texts at a time: use a larger GPU, `--device cpu`, or leave `--baseline` out"
            raise DeviceError(error.message, hint=hint) from error
        if self.harness is not None:
            batch = self.settings.batch_size
            size = choose_batch(model, self.emit) if batch == "auto" else batch
            side.answers = self.harness.ask(model, side.checkpoint.tokenizer(), size, self.settings.limit, self.emit)
        return model

    def _harness(self) -> "Harness | None":
        found, asked = find_tasks(self.settings), self.settings
        if found is None:
            return None
        self.code = found.code
        from marlin_tools.evaluation.harness import Harness  # now: it takes seconds, and a name that is wrong does not need it

        return Harness(found, asked.num_fewshot, asked.seed, self.emit)

    def _tokens(self, name: str) -> TokenSet:
        """The sequences of a text, as many as `limit` says."""
        config = self.subject.checkpoint.text_config
        seqlen = _window(self.settings, self.subject.checkpoint)
        tokens = evaluation_documents(name, self.tokenizer, seqlen=seqlen, vocab_size=config["vocab_size"])
        for note in tokens.notes:
            self.emit(Event("note", note))
        return _first(tokens, self.settings.limit)

    def _text_details(self, tokens: TokenSet) -> dict[str, object]:
        """Everything that a perplexity depends on besides the model."""
        count = len(tokens.sequences)
        coarse = {"kl": "a lower bound: the likeliest words of both models, and all others as one"}
        return {
            "on": f"{counted(count, 'window')} of {tokens.longest} tokens" if tokens.packed else counted(count, "document"),
            "what": "token perplexity: exp(mean over sequences of the mean token loss), float32 loss",
            "tokens": tokens.tokens,
            "sequences": count,
            "seqlen": tokens.longest,
            "stride": tokens.longest if tokens.packed else None,
            "shape": "windows of one text, no overlap, remainder dropped" if tokens.packed else "documents, each alone",
            "bos": ("one at the start" if tokens.packed else "one per document") if self.bos else "none",
            "fingerprint": tokens.fingerprint,
            "notes": list(tokens.notes),
        } | (coarse if self.settings.backend == "vllm" else {})


def choose_batch(model: "PreTrainedModel", emit: Emit) -> int:
    """Items per forward: their logits in the model's type and in float32 and their activations fill half of the free memory."""
    config = model.config.get_text_config()
    element = torch.finfo(model.dtype).bits // 8
    per_token = (element + 4) * config.vocab_size + 20 * element * config.hidden_size
    items = free_memory(model.device) // 2 // (per_token * min(ITEM_TOKENS, config.max_position_embeddings))
    size = 1 << (max(1, min(MAX_BATCH, items)).bit_length() - 1)
    emit(Event("note", f"batch size {size}: items of {ITEM_TOKENS} tokens in half of the free memory, at most {MAX_BATCH}"))
    return size


def _first(tokens: TokenSet, limit: float | None) -> TokenSet:
    """The first sequences, counted as lm-eval counts items."""
    if limit is None:
        return tokens
    count = int(limit) if limit >= 1 else -int(-limit * len(tokens.sequences) // 1)
    notes = (*tokens.notes, f"limit {limit:g}")
    return TokenSet(tokens.sequences[:count], tokens.source, tokens.packed, tokens.documents, notes=notes)
