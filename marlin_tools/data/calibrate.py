"""Stage `calibrate`: calibration text -> the token sequences that prune, finetune and quantize observe.

    tokens = calibrate("c4", checkpoint, num_samples=128, seqlen=2048, seed=0)

Read next: `data/samples.py` for the two shapes of samples and what a seed means.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from marlin_tools.data.render import ChatTemplate, Encoder
from marlin_tools.data.samples import LONGEST_DOCUMENT, choose, in_turn, pack
from marlin_tools.data.sources import BY_DOCUMENT, Shape, check_sources, each_of, find_corpus
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, counted
from marlin_tools.events import Emit, Event, silent
from marlin_tools.settings import Settings, checked

if TYPE_CHECKING:
    from marlin_tools.checkpoint.reader import Checkpoint

WINDOW = 2048
"""Length of packed windows when nobody names one."""


def _one_string(source: object) -> object:
    """Several sources are often written as a list."""
    if isinstance(source, list | tuple):
        said = ",".join(map(str, source))
        raise ValueError(f"several sources are one string with commas: `{said}`")  # noqa: TRY004 (what pydantic listens to)
    return source


class CalibrationSettings(Settings):
    """What to calibrate on.

    source         a name in `data.sources.SOURCES`, a file, or `hf:owner/name[:config][@split]`; of several, with commas
                   between them, each gives as many samples as the others
    num_samples    windows or documents
    seqlen         window length, or the longest document kept; by default 2048 or 4096, and never more than the model has
    seed           packed: 0 takes the first windows in order, any other draws from all of them; documents: every seed draws
    shape          "auto" packs if `seqlen` is given, and else does what suits the source (documents for `redpajama` by itself)
    fewer          whether fewer windows than `num_samples` will do, if the text has no more
    chat_template  "auto" renders conversations if the tokenizer has a template; "on" insists; "off" never does
    """

    source: Annotated[str, checked(check_sources), BeforeValidator(_one_string)] = "demo"
    num_samples: int = Field(default=128, ge=1, le=10**15)
    seqlen: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**32)
    shape: Literal["auto"] | Shape = "auto"
    fewer: bool = False
    chat_template: ChatTemplate = "auto"


def calibrate(
    source: str | Path | CalibrationSettings, checkpoint: "str | Path | Checkpoint", *, emit: Emit = silent, **options: Any
) -> TokenSet:
    """Token sequences for one model. `source` is a name with fields of `CalibrationSettings` as `options`, or all settings."""
    if isinstance(source, str | Path):
        check_sources(str(source))  # of ours is the error that whoever has typed it reads
        source = CalibrationSettings(source=str(source), **options)
    elif not isinstance(source, CalibrationSettings):
        raise TypeError(f"a source is a name, a file or CalibrationSettings, not {type(source).__name__}")
    elif options:
        raise TypeError(f"options belong into the settings: {', '.join(options)}")
    if isinstance(checkpoint, str | Path):
        from marlin_tools.checkpoint.reader import Checkpoint

        checkpoint = Checkpoint.open(checkpoint)
    elif not hasattr(checkpoint, "tokenizer"):
        raise TypeError(f"a model is a name, a directory or a Checkpoint, not {type(checkpoint).__name__}")
    emit(Event("stage", "calibrate"))
    tokens = _collect(source, checkpoint, emit)
    for note in tokens.notes:
        emit(Event("note", note))
    emit(Event("result", f"{counted(len(tokens.sequences), 'sequence')}, {tokens.tokens} tokens", data=tokens.describe()))
    return tokens


def preview(settings: CalibrationSettings, checkpoint: "Checkpoint", count: int = 3) -> list[str]:
    """The first samples exactly as the model will read them: template, special tokens and cuts included."""
    least = len(each_of(settings.source))
    few = settings.model_copy(update={"num_samples": min(max(count, least), settings.num_samples)})
    tokenizer = checkpoint.tokenizer()
    return [str(tokenizer.decode(sequence.tolist())) for sequence in _collect(few, checkpoint, silent).sequences]


def expected_tokens(settings: CalibrationSettings, checkpoint: "Checkpoint") -> tuple[int, int]:
    """(tokens, longest sequence) at most: what a plan can know before any text is opened."""
    for name, _ in _shares(settings):
        find_corpus(name)
    shape = _shape(settings, "documents" if settings.source in BY_DOCUMENT else "packed")
    length = _length(settings, checkpoint, WINDOW if shape == "packed" else LONGEST_DOCUMENT)
    return settings.num_samples * length, length


def _collect(settings: CalibrationSettings, checkpoint: "Checkpoint", emit: Emit) -> TokenSet:
    shares = [(find_corpus(name), count) for name, count in _shares(settings)]
    encode = Encoder(checkpoint.tokenizer(), settings.chat_template, checkpoint.text_config.get("vocab_size"))
    emit(Event("note", f"calibration text: `{settings.source}`"))
    parts = []
    for before, (open_corpus, count) in enumerate(shares):
        corpus, place = open_corpus(), (before, len(shares))
        if _shape(settings, corpus.shape if len(shares) == 1 else "packed") == "packed":
            length = _length(settings, checkpoint, WINDOW)
            parts.append(pack(corpus, encode, length, count, settings.seed, fewer=settings.fewer, place=place))
        else:
            length = _length(settings, checkpoint, LONGEST_DOCUMENT)
            parts.append(choose(corpus, encode, length, count, settings.seed, place=place))
    return parts[0] if len(parts) == 1 else in_turn(parts)


def _shares(settings: CalibrationSettings) -> list[tuple[str, int]]:
    """How many samples every source gives; what is left over the first ones give."""
    names, count = each_of(settings.source), settings.num_samples
    if count < len(names):
        message = f"{len(names)} sources cannot share {count} sample{'s' * (count > 1)}"
        raise DataError(message, hint=f"use `--num-samples {len(names)}` or more")
    return [(name, count // len(names) + (i < count % len(names))) for i, name in enumerate(names)]


def _shape(settings: CalibrationSettings, usual: Shape) -> Shape:
    if settings.shape != "auto":
        return settings.shape
    return "packed" if settings.seqlen is not None else usual


def _length(settings: CalibrationSettings, checkpoint: "Checkpoint", usual: int) -> int:
    longest = int(checkpoint.text_config.get("max_position_embeddings") or usual)
    if settings.seqlen is None:
        return min(usual, longest)
    if settings.seqlen > longest:
        message = f"sequence length {settings.seqlen} is more than the {longest} positions of the model"
        raise DataError(message, hint=f"use `--seqlen {longest}`")
    return settings.seqlen
