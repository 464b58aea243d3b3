"""What a recipe is made of: a stage is its settings, and with them all that planning and running it ask.

    makes        the model directories that it leaves, by name
    plan         what is known beforehand, from headers alone; raises what would stop it later
    foresee      what only its text can tell, before the stages before it work
    run          does it

Each stage stands in one module beside the function that does its work, and a recipe, a plan and a run only go through them.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from marlin_tools.checkpoint.manifest import read_manifest, record_stage
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.calibrate import CalibrationSettings, calibrate, expected_tokens
from marlin_tools.data.tokens import TokenSet
from marlin_tools.distributed.device import forget_peaks, leads, peak_memory, pick_device
from marlin_tools.errors import counted
from marlin_tools.events import Emit
from marlin_tools.settings import Settings

Facts = tuple[tuple[str, str], ...]
"""What and how much, for people."""


class Source:
    """A model, opened when somebody asks for it, and once."""

    def __init__(self, name: str | Path, find: Callable[[str | Path], Checkpoint] = Checkpoint.open) -> None:
        self.name, self._find = name, find

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model; in a dry run perhaps only its shapes."""
        return self._find(self.name)

    @property
    def opened(self) -> Checkpoint | None:
        """The model, if somebody has asked for it."""
        return vars(self).get("checkpoint")


@dataclass(frozen=True)
class Outlook:
    """What a plan knows when it comes to a stage.

    source    the model that the recipe starts from
    find      opens another model the same way
    text      the calibration text
    formats   all formats that the recipe writes
    first     whether no earlier stage changes the model
    quantized whether it is quantised by then
    dry       whether nothing will follow
    """

    source: Source
    find: Callable[[str | Path], Checkpoint]
    text: CalibrationSettings | None
    formats: tuple[str, ...]
    first: bool
    quantized: bool
    dry: bool

    @property
    def model(self) -> Checkpoint:
        """The model that the recipe starts from; in a dry run perhaps only its shapes."""
        return self.source.checkpoint

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """(tokens, longest sequence) of the calibration, at most; no text is read for it."""
        return expected_tokens(self.text, self.model) if self.text else (0, 0)

    def calibration(self) -> Facts:
        """The text that the stage will look at."""
        if self.text is None:
            return ()
        some = f"{counted(self.text.num_samples, 'sample')} of `{self.text.source}`"
        return (("calibration", f"{some}, at most {self.tokens[0]} tokens"),)


@dataclass(frozen=True)
class StagePlan:
    """What a stage knows before it runs: for people, and for the run itself, which then need not find it out again."""

    facts: Facts
    prepared: Any = None


@dataclass
class Work:
    """A stage's place in a run.

    source     the model that it reads
    outputs    the directories that it makes, by name
    original   the model of the recipe
    text       the calibration text
    prepared   what its plan found out about this very model
    made       the model directories of the stages before it
    home       where a run that makes no model puts what it finds
    texts      what a stage has foreseen and not yet read
    """

    source: Source
    outputs: dict[str, Path]
    original: str
    text: CalibrationSettings | None
    emit: Emit
    prepared: Any = None
    overwrite: bool = False
    resume: bool = True
    made: Sequence[Path] = ()
    home: Path | None = None
    shown: list[Path] = field(default_factory=list)
    texts: dict[str, TokenSet] = field(default_factory=dict)

    @property
    def model(self) -> Checkpoint:
        """The model that it reads."""
        return self.source.checkpoint

    @property
    def output(self) -> Path:
        """The one directory that the stage makes."""
        (path,) = self.outputs.values()
        return path

    @property
    def how(self) -> dict[str, Any]:
        """What every function that makes a model is told besides."""
        return {"emit": self.emit, "overwrite": self.overwrite, "resume": self.resume}

    def tokens(self, text: CalibrationSettings | None) -> TokenSet | None:
        """The text as the model reads it."""
        if text is None:
            return None
        return self.texts.pop(text.model_dump_json(), None) or calibrate(text, self.model, emit=self.emit)

    def foreseen(self, text: CalibrationSettings | None) -> TokenSet | None:
        """The same for a stage that is yet to come, which then need not read it again."""
        tokens = self.tokens(text)
        if text and tokens:
            self.texts[text.model_dump_json()] = tokens
        return tokens

    @contextmanager
    def clock(self, stage: str, *paths: Path, device: str = "cpu", always: bool = False) -> Iterator[None]:
        """Record what a stage has cost in the manifests of `paths`, unless it found its result there and kept it."""
        before = {path: read_manifest(path) for path in paths}
        begin = time.perf_counter()
        forget_peaks(pick_device(device))
        yield
        if not leads():
            return
        cost = {"seconds": time.perf_counter() - begin, **peak_memory(pick_device(device))}
        for path in paths:
            if always or before[path] != read_manifest(path):
                record_stage(path, stage, cost)


class Stage(Settings):
    """One step of a recipe.

    remakes   whether it makes another model, so that what follows reads that one
    shares    whether processes of `torchrun` can do it together
    """

    stage: str
    remakes: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    @property
    def makes(self) -> tuple[str, ...]:
        """The model directories that it leaves, by name."""
        return ()

    @property
    def needs_data(self) -> bool:
        """Whether it looks at the calibration text."""
        return False

    def reads(self, text: CalibrationSettings | None) -> CalibrationSettings | None:
        """The text that it looks at, if `text` is that of the recipe."""
        return text if self.needs_data else None

    def differs(self, before: "Stage") -> bool:
        """Whether it certainly gives another result than one of its kind; there is more that decides, such as the model."""
        return False

    @property
    def choice(self) -> str:
        """How people name what it was told to do."""
        return f"`{self.stage}`"

    @abstractmethod
    def plan(self, outlook: Outlook) -> StagePlan:
        """What is known beforehand; raises what would stop the stage later."""

    def foresee(self, work: Work) -> None:
        """Refuse a text that will not do before earlier stages have worked for hours; `work` is that of the first of them."""

    @abstractmethod
    def run(self, work: Work) -> dict[str, Any]:
        """Do it; returns what the result of the run has gained, by the names of `RunResult`."""


def made_with(settings: Settings, tokens: TokenSet | None) -> dict[str, Any]:
    """What a run notes of itself besides its fingerprint, which tells that something is another, but not what."""
    return {"settings": settings.model_dump(mode="json"), "text": [len(tokens.sequences), tokens.seed] if tokens else None}
