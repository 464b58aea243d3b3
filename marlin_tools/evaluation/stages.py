"""The stages `evaluate` and `generate` of a recipe."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from marlin_tools.checkpoint.journal import fingerprint_of
from marlin_tools.checkpoint.manifest import read_manifest, versions
from marlin_tools.checkpoint.output import folder, put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.device import pick_device
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.evaluation.generate import GenerateSettings, generate
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.events import Event
from marlin_tools.resources import demo_dir
from marlin_tools.stage import Outlook, Planned, Stage, Work

EVALUATION = "evaluation.json"


class EvaluateStage(EvaluateSettings, Stage):
    """Measure the model, and `baseline` as well, if one is named."""

    stage: Literal["evaluate"] = "evaluate"
    baseline: str | None = None

    def plan(self, outlook: Outlook) -> Planned:
        """What is measured, and what that takes."""
        facts = [("tasks", ", ".join(self.tasks)), ("baseline", self.baseline or "none")]
        if outlook.dry:
            size = outlook.model.nbytes / 1e9
            facts.append(("memory", f"{size:.1f} GB of weights for each model, if they run in 16 bits"))
        return Planned(tuple(facts))

    def run(self, work: Work) -> dict[str, Any]:
        """Measure, or take over an earlier measurement of the same weights on the same text."""
        checkpoint = work.model
        own = read_manifest(checkpoint.path) is not None
        home = checkpoint.path if own else work.home
        if home:
            folder(home, "the scores are kept beside the model: evaluate a copy that can be written to")
        work.shown += [checkpoint.path] if own else []
        fingerprint = self.fingerprint(checkpoint)
        if home and not work.overwrite and (found := _read(home / EVALUATION)).get("fingerprint") == fingerprint:
            work.emit(Event("note", f"`{home / EVALUATION}` already holds this evaluation; nothing to do"))
            return {"evaluation": Evaluation.restore(found)}
        with work.clock("evaluate", *([checkpoint.path] if own else []), device=self.device, always=True):
            evaluation = evaluate(checkpoint, self, baseline=self.baseline, emit=work.emit)
        if home:
            content = {"fingerprint": fingerprint, **evaluation.describe()}
            del content["times"]  # the only part that differs from run to run
            put(home / EVALUATION, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return {"evaluation": evaluation}

    def fingerprint(self, checkpoint: Checkpoint) -> str:
        """Everything that decides the numbers: weights, settings, device, versions, contents of local texts and tasks."""
        texts = [Path(task.removeprefix("ppl:")) for task in self.tasks if task.startswith("ppl:")]
        folders = (demo_dir() / "tasks", *self.include_path)
        files = [*texts, *(path for folder in folders for path in sorted(folder.rglob("*")))]
        return fingerprint_of(
            model=checkpoint.fingerprint,
            baseline=Checkpoint.open(self.baseline).fingerprint if self.baseline else None,
            settings=self.model_dump(mode="json"),
            device=pick_device(self.device).type,
            files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
            versions=versions(),
        )


class GenerateStage(GenerateSettings, Stage):
    """Continue a text."""

    stage: Literal["generate"] = "generate"
    prompt: str

    def plan(self, outlook: Outlook) -> Planned:
        """The prompt."""
        return Planned((("prompt", self.prompt),))

    def run(self, work: Work) -> dict[str, Any]:
        """Continue it."""
        return {"text": generate(work.model, self.prompt, self, emit=work.emit)}


def _read(path: Path) -> dict[str, Any]:
    """An earlier evaluation; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
