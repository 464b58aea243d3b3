"""The stage `verify` of a recipe."""

from pathlib import Path
from typing import Any, Literal

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.stage import Outlook, Stage, StagePlan, Work
from marlin_tools.verification.verify import verify


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
