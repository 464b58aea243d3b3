"""Stage `verify`: whether a directory is a complete, legal and working INT4 model, and which engines will load it.

Three kinds of checks, in this order: headers (files, config, inventory, size), every stored value (scales, zero points, codes,
hashes), and the model at work (its logits against those stored when it was quantised, and some greedy tokens). A check that
finds something names the tensor. A bad checkpoint fails checks; only what is no checkpoint at all is an error.

Read next: `checks.py` for what lies on disk, `trial.py` for what the model computes, `engines.py` for who loads it.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.strict_json import read_object
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.formats.contents import Contents
from marlin_tools.resources import expanded
from marlin_tools.stage import Outlook, Stage, StagePlan, Work
from marlin_tools.verification.checks import Check, Subject, check_config, check_files
from marlin_tools.verification.engines import EngineVerdict, judge_checkpoint
from marlin_tools.verification.trial import try_model

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """All checks of a directory, and what each engine will make of it."""

    checks: tuple[Check, ...]
    engines: tuple[EngineVerdict, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok for check in self.checks)

    @property
    def skipped(self) -> int:
        """How many checks were not made, which is no pass."""
        return sum(check.skipped for check in self.checks)

    @property
    def counted(self) -> str:
        """How many checks passed, failed and were skipped."""
        counts = Counter(check.result for check in self.checks)
        words = {"ok": "passed", "FAILED": "failed", "skipped": "skipped"}
        return ", ".join(f"{counts[result]} {word}" for result, word in words.items() if counts[result] or result == "ok")

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "ok": self.ok,
            "skipped": self.skipped,
            "checks": [{**asdict(check), "result": check.result} for check in self.checks],
            "engines": [asdict(engine) for engine in self.engines],
        }


def verify(directory: str | Path | Checkpoint, *, device: str = "cpu", emit: Emit = silent) -> Verification:
    """Check a quantised model directory; the model itself runs on `device`."""
    emit(Event("stage", "verify"))
    checks: list[Check] = []
    for check in _checks(directory, device):
        checks.append(check)
        emit(Event("progress", check.name, len(checks), data={"result": check.result, "detail": check.detail}))
    readable = all(check.ok for check in checks if check.name in {"files", "config"})
    engines = judge_checkpoint(Contents(Checkpoint.open(directory))) if readable else ()
    found = Verification(tuple(checks), engines)
    failed = [check.name for check in checks if not check.ok]
    emit(Event("result", f"failed: {', '.join(failed)}" if failed else f"checks: {found.counted}"))
    return found


def check_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a model without codes."""
    if checkpoint.quantization is None:
        raise FormatError(
            f"`{checkpoint.origin}` is not quantised",
            hint=f"`marlin-tools inspect {shlex.quote(checkpoint.origin)}` describes any model",
        )


def _checks(directory: str | Path | Checkpoint, device: str) -> Iterator[Check]:
    """All checks in order; those that would only repeat that something before them is unreadable are left out."""
    try:
        checkpoint = Checkpoint.open(directory)
    except ModelError as error:
        if not _looks_like_a_model(expanded(str(directory))):
            raise
        yield Check("files", ok=False, detail=error.message)
        return
    check_quantized(checkpoint)
    yield check_files(checkpoint)
    config = check_config(checkpoint)
    yield config
    if not config.ok:
        return
    subject = Subject(checkpoint)
    inventory = subject.inventory()
    yield inventory
    yield subject.size()
    codes_are_legal = True
    for check in subject.values():
        codes_are_legal &= check.ok or check.name == "scales"
        yield check
    yield subject.hashes()
    if inventory.ok and codes_are_legal:
        yield from try_model(checkpoint, device)


def _looks_like_a_model(path: Path) -> bool:
    try:
        read_object(path / "config.json")
    except (OSError, ModelError):
        return False
    return any(path.glob("*.safetensors"))


class VerifyStage(Stage):
    """Check every directory that the run has written, or the model itself if it has written none."""

    stage: Literal["verify"] = "verify"

    def plan(self, outlook: Outlook) -> StagePlan:
        """What is looked at."""
        return StagePlan((("checks", "shapes, bytes and numbers of every directory written"),))

    def run(self, work: Work) -> dict[str, Any]:
        """One directory after the other."""
        made = [path for path in work.made if Checkpoint.open(path).quantization is not None]
        found = {}
        for path in made or [Path(work.source.name)]:
            with work.clock("verify", *([path] if made else []), always=True):
                found[path] = verify(path, emit=work.emit)
        return {"verifications": found}
