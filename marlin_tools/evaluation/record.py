"""Stage `evaluate` in a recipe, and evaluation.json: a measurement beside the weights that were measured.

It is taken over while nothing that decides it changes.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from marlin_tools.backends import check_activations, check_place
from marlin_tools.backends.vllm import check_here, identity
from marlin_tools.checkpoint.cards import CARDS, sketch
from marlin_tools.checkpoint.contract import Evaluated
from marlin_tools.checkpoint.journal import fingerprint_of
from marlin_tools.checkpoint.manifest import read_manifest, versions
from marlin_tools.checkpoint.output import check_apart, folder, gigabytes, put, sha256_of
from marlin_tools.checkpoint.reader import Checkpoint, hub_repository
from marlin_tools.checkpoint.strict_json import conforms, read_object
from marlin_tools.distributed.device import describe_device, pick_device
from marlin_tools.errors import ModelError, OutputError
from marlin_tools.evaluation.evaluate import EvaluateSettings, check_asked, check_data, check_vocabulary, evaluate, find_tasks
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.events import Emit, Event, silent
from marlin_tools.resources import demo_dir, expanded, resolved
from marlin_tools.settings import ModelName
from marlin_tools.stage import Outlook, Stage, StagePlan, Work

NAME = "evaluation.json"


class Record:
    """The measurement of a model in the directory `home`, or nowhere; that it can be written is seen before any work."""

    def __init__(self, home: Path | None, model: Checkpoint, settings: EvaluateSettings, baseline: str | None) -> None:
        self.home, self.model, self.settings, self.baseline = home, model, settings, baseline
        if home is not None:
            if resolved(home) != resolved(model.path):  # the scores of one model are nothing to find in another one
                check_apart(home / NAME)
            folder(home, hint="measure a copy of the model, or make its directory writable")
            if (home / NAME).is_dir():
                raise OutputError(f"`{home / NAME}` is a directory, and a file is to be written there", hint="move it away")

    def found(self, emit: Emit = silent) -> Evaluation | None:
        """An earlier measurement, if nothing that decides it has changed.

        What we did not write is written anew, but not what cannot be read at all: it may be somebody else's.
        """
        try:
            found = read_record(self.home) if self.home else None
        except ModelError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return None
        if found is None or found["fingerprint"] != self.fingerprint:
            return None
        emit(Event("note", f"`{self.home}/{NAME}` already holds this evaluation; nothing to do"))
        return Evaluation.restore(found)

    def measure(self, emit: Emit = silent) -> Evaluation:
        """Measure, and write it down."""
        measured = evaluate(self.model, self.settings, baseline=self.baseline, emit=emit)
        if self.home is not None:
            content = {"fingerprint": self.fingerprint, **measured.describe()}
            del content["times"]  # the only part that differs from run to run
            put(self.home / NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return measured

    @cached_property
    def fingerprint(self) -> str:
        """Everything that decides the numbers: weights, settings, device, versions, contents of local texts and tasks."""
        asked = self.settings
        texts = [Path(task.removeprefix("ppl:")) for task in asked.tasks if task.startswith("ppl:")]
        folders = (demo_dir() / "tasks", *asked.include_path)
        device = pick_device(asked.device)
        beside = [self.model, *([] if self.baseline is None else [Checkpoint.open(self.baseline)])]
        files = [*texts, *(path for each in folders for path in sorted(each.rglob("*"))), *self._data_of_tasks()]
        return fingerprint_of(
            models=[each.fingerprint for each in beside],
            read_by=[{file.name: sha256_of(file) for file in each.companions()} for each in beside],
            settings=asked.model_dump(mode="json", exclude={"stage", "baseline"}),
            device=describe_device(device) if device.type == "cuda" else device.type,  # however many threads it has
            files={str(path): sha256_of(path) for path in files if path.is_file()},
            versions=versions(),
            **(identity() if asked.backend == "vllm" else {}),
        )

    def _data_of_tasks(self) -> list[Path]:
        """What tasks of the user's read, wherever it lies."""
        asked = self.settings
        if not asked.include_path or not asked.questions:
            return []
        from marlin_tools.evaluation.task_index import Tasks

        return Tasks(asked.questions, asked.include_path, allow_code=asked.allow_task_code).data


def read_record(home: Path) -> dict[str, Any] | None:
    """An earlier evaluation; None if there is none, an error if it is not what we write."""
    file, hint = home / NAME, "remove it, and measure again"
    if not file.exists():
        return None
    content = read_object(file, hint=hint)
    conforms(Evaluated, content, str(file), hint=hint)
    return content


class EvaluateStage(EvaluateSettings, Stage):
    """Measure the model, and `baseline` as well, if one is named."""

    stage: Literal["evaluate"] = "evaluate"
    baseline: ModelName | None = None

    def plan(self, outlook: Outlook) -> StagePlan:
        """Refuse what could not be measured when the model is made, perhaps hours from now; say what it takes."""
        check_asked(self, outlook.model)
        if not outlook.quantized:
            check_activations(outlook.model, self.activations)
        find_tasks(self)
        check_place(self.backend, pick_device(self.device))
        if self.backend == "vllm" and not outlook.dry:
            check_here()
        if self.baseline is not None and self.baseline != outlook.source.name:
            original = _shapes(self.baseline) if outlook.dry else Checkpoint.open(self.baseline)
            if self.texts and original is not None:
                check_vocabulary(outlook.model, original)
        facts = [("tasks", ", ".join(self.tasks)), ("baseline", self.baseline or "none")]
        if outlook.dry:
            size = gigabytes(outlook.model.nbytes / 1e9)
            facts.append(("memory", f"{size} of weights for each model, if they run in 16 bits"))
        return StagePlan(tuple(facts))

    def foresee(self, work: Work) -> None:
        """Tasks and texts that cannot be had."""
        check_data(work.model, self)

    def run(self, work: Work) -> dict[str, Any]:
        """Measure, or take over an earlier measurement of the same weights on the same text."""
        checkpoint = work.model
        own = read_manifest(checkpoint.path) is not None
        work.shown += [checkpoint.path] if own else []
        record = Record(checkpoint.path if own else work.home, checkpoint, self, self.baseline)
        found = None if work.overwrite else record.found(work.emit)
        if found is None:
            with work.clock("evaluate", *([checkpoint.path] if own else []), device=self.device, always=True):
                found = record.measure(work.emit)
        return {"evaluation": found}


def _shapes(model: str) -> Checkpoint | None:
    """What is known of a model without a question to the hub; refuses what is no name of one."""
    here = model == "demo" or expanded(model).is_dir() or hub_repository(model)[0] in CARDS
    return sketch(model, None) if here else None
