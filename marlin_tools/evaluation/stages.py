"""The stages `evaluate` and `generate` of a recipe."""

from typing import Any, Literal

from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.evaluation.evaluate import EvaluateSettings
from marlin_tools.evaluation.generate import GenerateSettings, generate
from marlin_tools.evaluation.record import Record
from marlin_tools.stage import Outlook, Stage, StagePlan, Work


class EvaluateStage(EvaluateSettings, Stage):
    """Measure the model, and `baseline` as well, if one is named."""

    stage: Literal["evaluate"] = "evaluate"
    baseline: str | None = None

    def plan(self, outlook: Outlook) -> StagePlan:
        """What is measured, and what that takes."""
        facts = [("tasks", ", ".join(self.tasks)), ("baseline", self.baseline or "none")]
        if outlook.dry:
            size = outlook.model.nbytes / 1e9
            facts.append(("memory", f"{size:.1f} GB of weights for each model, if they run in 16 bits"))
        return StagePlan(tuple(facts))

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


class GenerateStage(GenerateSettings, Stage):
    """Continue a text."""

    stage: Literal["generate"] = "generate"
    prompt: str

    def plan(self, outlook: Outlook) -> StagePlan:
        """The prompt."""
        return StagePlan((("prompt", self.prompt),))

    def run(self, work: Work) -> dict[str, Any]:
        """Continue it."""
        return {"text": generate(work.model, self.prompt, self, emit=work.emit)}
