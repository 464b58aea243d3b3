"""The engine: recipe -> plan -> result. Every verb of the command line goes through `planning.plan` and `execute`.

`execute` runs the stages in order; what is already there and matches is kept. `evaluation.json` lies beside the weights that
were measured, and every directory holds the `recipe.yaml` that makes it again, a page that shows it and a model card.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from marlin_tools import report
from marlin_tools.checkpoint.journal import fingerprint_of
from marlin_tools.checkpoint.manifest import read_manifest, record_stage, versions
from marlin_tools.checkpoint.output import check_output, folder, put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.compress.prune import prune
from marlin_tools.compress.quantize import quantize
from marlin_tools.data.calibrate import calibrate
from marlin_tools.distributed.device import leads, peak_memory, pick_device, processes
from marlin_tools.errors import OutputError, RecipeError
from marlin_tools.evaluation.evaluate import evaluate
from marlin_tools.evaluation.generate import generate
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.events import Emit, Event, silent
from marlin_tools.recipe.files import load
from marlin_tools.recipe.recipe import (
    EvaluateStage,
    ExportStage,
    FinetuneStage,
    GenerateStage,
    Making,
    PruneStage,
    QuantizeStage,
    Recipe,
    VerifyStage,
)
from marlin_tools.resources import demo_dir
from marlin_tools.run.plan import RUNS, Plan, Step
from marlin_tools.training.finetune import finetune
from marlin_tools.verification.verify import Verification, verify

RECIPE = "recipe.yaml"
EVALUATION = "evaluation.json"


@dataclass
class RunResult:
    """What a run has led to."""

    outputs: list[Path] = field(default_factory=list)
    evaluation: Evaluation | None = None
    verifications: dict[Path, Verification] = field(default_factory=dict)
    text: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(verification.ok for verification in self.verifications.values())

    def describe(self) -> dict[str, Any]:
        """As plain data; what did not happen is not in it."""
        verifications = {str(path): {"ok": each.ok, **asdict(each)} for path, each in self.verifications.items()}
        content = {
            "outputs": [str(path) for path in self.outputs],
            "evaluation": self.evaluation.describe() if self.evaluation else None,
            "verification": verifications,
            "text": self.text,
        }
        return {key: value for key, value in content.items() if value} | {"ok": self.ok, "warnings": self.warnings}


def newest_run() -> Path:
    """The model directory under `runs/` that was worked on last."""
    made = [path for path in RUNS.rglob("manifest.json") if not any(".partial" in part for part in path.parts)]
    if not made:
        raise RecipeError(f"there is no model under `{RUNS}/`", hint="name a MODEL, or make one: marlin-tools quantize demo")
    return max(made, key=lambda path: (path.stat().st_mtime_ns, path)).parent


def execute(
    planned: Plan, emit: Emit = silent, *, overwrite: bool = False, resume: bool = True, start: str | None = None
) -> RunResult:
    """Run the stages. With `start`, those before it are taken as they are and the others are run again."""
    _check_processes(planned)
    _check_outputs(planned)
    run = _Run(planned, emit, resume=resume)
    for note in planned.notes:
        emit(Event("note", note))
    first = _position(planned, start)
    for index, step in enumerate(planned.steps):
        if index < first:
            run.adopt(step)
        else:
            run.perform(step, overwrite=overwrite or start is not None)
    return run.finish()


def _check_processes(planned: Plan) -> None:
    """Quantising and finetuning know how to share their work."""
    alone = [step.stage.stage for step in planned.steps if not isinstance(step.stage, QuantizeStage | FinetuneStage)]
    if processes() > 1 and alone:
        raise RecipeError(
            f"stage `{alone[0]}` runs in one process, `torchrun` has started {processes()}",
            hint="run it without `torchrun`; `quantize` (into one format) and `finetune` can share their work",
        )


def _check_outputs(planned: Plan) -> None:
    """Every place that the run will write to, before any work: nothing of others lies there, and it can be written to."""
    if not leads():
        return
    stages, text = planned.recipe.stages, planned.recipe.calibrate
    read = [planned.recipe.model, *([text.source] if text else [])]
    read += [name for each in stages for key in ("baseline", "teacher") if (name := getattr(each, key, None))]
    read += [task.removeprefix("ppl:") for task in planned.recipe.tasks]
    there = [name for name in read if name != "demo" and Path(name).expanduser().exists()]
    for step in planned.steps:
        for path in step.outputs.values():
            check_output(path, there, overwrite=True)  # whether a result of ours may go is asked for stage by stage


def _position(planned: Plan, start: str | None) -> int:
    stages = [step.stage.stage for step in planned.steps]
    if start is None:
        return 0
    if start not in stages:
        raise RecipeError(f"`--from {start}`: the recipe has no such stage", hint=f"its stages: {', '.join(stages)}")
    return stages.index(start)


class _Run:
    """One run in progress."""

    def __init__(self, planned: Plan, emit: Emit, *, resume: bool) -> None:
        self.recipe, self.home, self.resume = planned.recipe, planned.home, resume
        self.result = RunResult()
        self._emit = emit
        self._shown: list[Path] = []

    def emit(self, event: Event) -> None:
        """Pass an event on and remember warnings."""
        if event.kind == "warning":
            self.result.warnings.append(event.text)
        self._emit(event)

    def adopt(self, step: Step) -> None:
        """Take the results of a stage that is not run again, if they are of this recipe."""
        for path in step.outputs.values():
            if not (path / RECIPE).is_file() or read_manifest(path) is None:
                raise OutputError(f"`{path}` holds no finished result to go on from", hint="run without `--from`")
            found = load(path / RECIPE)
            if _making(found, step) != _making(self.recipe, step):
                raise OutputError(f"`{path}` was made with other settings", hint="run without `--from`, with `--overwrite`")
            self._keep(path)

    def perform(self, step: Step, *, overwrite: bool) -> None:
        """Run one stage."""
        match step.stage:
            case PruneStage() | FinetuneStage() | QuantizeStage():
                self._make(step, overwrite=overwrite)
            case ExportStage():
                for name, path in step.outputs.items():
                    with self._clock("export", path):
                        export(step.model, name, path, emit=self.emit, overwrite=overwrite)
                    self._keep(path)
            case EvaluateStage() as stage:
                self._evaluate(stage, step, overwrite=overwrite)
            case VerifyStage():
                made = self._quantized(self.result.outputs)
                for path in made or [Path(step.model)]:
                    with self._clock("verify", *([path] if made else []), always=True):
                        self.result.verifications[path] = verify(path, emit=self.emit)
            case GenerateStage() as stage:
                self.result.text = generate(step.model, stage.prompt, stage.settings, emit=self.emit)

    def finish(self) -> RunResult:
        """The result, with the warnings that kept results had when they were made; every directory gets its page."""
        for path in self.result.outputs:
            self.result.warnings += (read_manifest(path) or {}).get("warnings", [])
        self.result.warnings = list(dict.fromkeys(self.result.warnings))
        if not leads():
            return self.result
        quantized = self._quantized(self.result.outputs)
        measured = self.result.evaluation if {*self._shown} & {*quantized} else None  # holds for the other formats as well
        for path in dict.fromkeys((*self.result.outputs, *self._shown)):
            evaluation = measured if path in quantized else None
            for name, text in report.pages(path, self.result.verifications.get(path), evaluation).items():
                put(path / name, text)
        return self.result

    @contextmanager
    def _clock(self, stage: str, *paths: Path, device: str = "cpu", always: bool = False) -> Iterator[None]:
        """Record what a stage has cost in the manifests of `paths`, unless it found its result there and kept it."""
        before = {path: read_manifest(path) for path in paths}
        begin = time.perf_counter()
        yield
        if not leads():
            return
        cost = {"seconds": time.perf_counter() - begin, **peak_memory(pick_device(device))}
        for path in paths:
            if always or before[path] != read_manifest(path):
                record_stage(path, stage, cost)

    def _make(self, step: Step, *, overwrite: bool) -> None:
        """Run a stage that makes another model."""
        (path,) = step.outputs.values()
        stage = step.stage
        assert isinstance(stage, Making)
        text = stage.text if isinstance(stage, FinetuneStage) and stage.text else self.recipe.calibrate
        with self._clock(f"calibrate and {stage.stage}", path, device=stage.device):
            reads = stage.needs_data or text is not self.recipe.calibrate
            tokens = calibrate(text, Checkpoint.open(step.model), emit=self.emit) if text and reads else None
            how: dict[str, Any] = {"emit": self.emit, "overwrite": overwrite, "resume": self.resume}
            match stage:
                case PruneStage():
                    prune(step.model, tokens, stage.settings, path, **how)
                case FinetuneStage():
                    finetune(step.model, tokens, stage.settings_for(self.recipe.model), path, **how)
                case QuantizeStage():
                    quantize(step.model, tokens, stage.settings, path, **how)
        self._keep(path)

    @staticmethod
    def _quantized(paths: Iterable[Path]) -> list[Path]:
        """Those that hold no model in 16 bits."""
        return [path for path in paths if Checkpoint.open(path).quantization is not None]

    def _keep(self, path: Path) -> None:
        """Count `path` among the results; a result that another recipe made in the same way now belongs to this one."""
        if leads():
            put(path / RECIPE, self.recipe.dump())
        self.result.outputs.append(path)

    def _evaluate(self, stage: EvaluateStage, step: Step, *, overwrite: bool) -> None:
        """Measure, or take over an earlier measurement of the same weights on the same text."""
        checkpoint = Checkpoint.open(step.model)
        own = read_manifest(checkpoint.path) is not None
        home = checkpoint.path if own else self.home
        if home:
            folder(home, "the scores are kept beside the model: evaluate a copy that can be written to")
        run = _evaluation_fingerprint(stage, checkpoint)
        if home and not overwrite and (found := _read(home / EVALUATION)).get("fingerprint") == run:
            self.emit(Event("note", f"`{home / EVALUATION}` already holds this evaluation; nothing to do"))
            self.result.evaluation = Evaluation.restore(found)
        else:
            with self._clock("evaluate", *([checkpoint.path] if own else []), device=stage.device, always=True):
                self.result.evaluation = evaluate(checkpoint, stage.settings, baseline=stage.baseline, emit=self.emit)
            if home:
                content = {"fingerprint": run, **self.result.evaluation.describe()}
                del content["times"]  # the only part that differs from run to run
                put(home / EVALUATION, json.dumps(content, indent=1, allow_nan=False) + "\n")
        self._shown += [checkpoint.path] if own else []


def _making(recipe: Recipe, step: Step) -> tuple[object, ...]:
    """The part of a recipe that decides what the weights are after a step."""
    names = [stage.stage for stage in recipe.making]
    last = names.index(step.stage.stage) + 1 if step.stage.stage in names else len(names)
    return recipe.model, recipe.calibrate, recipe.making[:last]


def _evaluation_fingerprint(stage: EvaluateStage, checkpoint: Checkpoint) -> str:
    """Everything that decides the numbers: weights, settings, versions and the contents of local texts and tasks."""
    texts = [Path(task.removeprefix("ppl:")) for task in stage.tasks if task.startswith("ppl:")]
    files = [*texts, *(path for folder in (demo_dir() / "tasks", *stage.include_path) for path in sorted(folder.rglob("*")))]
    return fingerprint_of(
        model=checkpoint.fingerprint,
        baseline=Checkpoint.open(stage.baseline).fingerprint if stage.baseline else None,
        settings=stage.model_dump(mode="json"),
        files={str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
        versions=versions(),
    )


def _read(path: Path) -> dict[str, Any]:
    """An earlier evaluation; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
