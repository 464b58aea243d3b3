"""evaluation.json: a measurement beside the weights that were measured, taken over while nothing that decides it changes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.journal import fingerprint_of
from marlin_tools.checkpoint.manifest import versions
from marlin_tools.checkpoint.output import folder, put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.device import describe_device, pick_device
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.events import Emit, Event, silent
from marlin_tools.resources import demo_dir

NAME = "evaluation.json"


def evaluate_into(
    home: Path,
    model: Checkpoint,
    settings: EvaluateSettings,
    *,
    baseline: str | None = None,
    overwrite: bool = False,
    emit: Emit = silent,
) -> tuple[Evaluation, bool]:
    """The scores of a model, and whether they were measured now; whether `home` can be written is seen before any work."""
    folder(home, hint="measure a copy of the model, or make its directory writable")
    run = _fingerprint(model, settings, baseline)
    found = read_record(home)
    if not overwrite and found.get("fingerprint") == run:
        emit(Event("note", f"`{home / NAME}` already holds this evaluation; nothing to do"))
        return Evaluation.restore(found), False
    measured = evaluate(model, settings, baseline=baseline, emit=emit)
    content = {"fingerprint": run, **measured.describe()}
    del content["times"]  # the only part that differs from run to run
    put(home / NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return measured, True


def read_record(home: Path) -> dict[str, Any]:
    """An earlier evaluation; empty if there is none that can be read."""
    try:
        content = json.loads((home / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _fingerprint(model: Checkpoint, settings: EvaluateSettings, baseline: str | None) -> str:
    """Everything that decides the numbers: weights, settings, device, versions and the contents of local texts and tasks."""
    texts = [Path(task.removeprefix("ppl:")) for task in settings.tasks if task.startswith("ppl:")]
    folders = (demo_dir() / "tasks", *settings.include_path)
    files = [*texts, *(path for each in folders for path in sorted(each.rglob("*")))]
    return fingerprint_of(
        model=model.fingerprint,
        baseline=Checkpoint.open(baseline).fingerprint if baseline else None,
        settings=settings.model_dump(mode="json"),
        device=_device(settings.device),
        files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
        versions=versions(),
    )


def _device(name: str) -> str:
    """What computes, however many threads it has."""
    device = pick_device(name)
    return describe_device(device) if device.type == "cuda" else device.type
