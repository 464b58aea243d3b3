"""A recipe: one model and the stages it goes through, as one checked value.

Every verb of the command line builds a recipe, every file in `recipes/` is one, and every output directory holds the one that
made it, so there is a single way in which anything is run. A stage is the settings of its module (see `stage.py`):

    name: demo
    model: demo
    calibrate: {source: demo}
    stages:
      - {stage: quantize, preset: default}
      - {stage: evaluate, tasks: [demo_qa], baseline: demo}

Read next: `files.py`, which finds and reads them; `run/`, which plans and executes them.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from marlin_tools.checkpoint.cards import sketch
from marlin_tools.compress.export import ExportStage
from marlin_tools.compress.prune import PruneSettings
from marlin_tools.compress.quantize import QuantizeSettings
from marlin_tools.data.calibrate import CalibrationSettings, expected_tokens
from marlin_tools.errors import ModelError, counted
from marlin_tools.evaluation.generate import GenerateStage
from marlin_tools.evaluation.record import EvaluateStage
from marlin_tools.evaluation.scores import BESIDE_ANOTHER, OF_TEXTS
from marlin_tools.recipe import yaml_reader as recipe_yaml
from marlin_tools.recipe.yaml_reader import Document
from marlin_tools.settings import ModelName, Settings, complaint
from marlin_tools.stage import Stage
from marlin_tools.training.finetune import FinetuneSettings
from marlin_tools.verification.verify import VerifyStage

PAPER_DOCUMENTS = 256
"""How many documents the paper calibrates on."""

DEMO_WINDOWS = 64
"""How many windows of 1024 tokens the embedded text surely has."""

TRAINING_WINDOWS, MOST_WINDOWS, TRAINING_LENGTH = 8192, 65536, 1024
"""How much text is trained on when nobody says how much: at least, at most, and how long a window is."""

Step = Annotated[
    PruneSettings | FinetuneSettings | QuantizeSettings | ExportStage | EvaluateStage | VerifyStage | GenerateStage,
    Field(discriminator="stage"),
]
"""What can stand in `stages`."""


class Expectation(Settings):
    """A number that was published, and how far from it a measured one may lie.

    task, metric   which score; the first of the task if no metric is named
    value          as a score is written: accuracy as a share of 1
    tolerance      left out: shown beside the measured one, never judged
    note           why it cannot be judged, or what the tolerance rests on
    """

    task: str
    metric: str | None = None
    value: float = Field(allow_inf_nan=False)
    tolerance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    note: str = ""


class Recipe(Settings):
    """One model and what happens to it.

    name         names the output: `runs/<name>-<scheme>`
    model        a directory, a hub id or an alias
    description  one line for `recipes list`
    source       where the settings and the expected numbers come from
    deviations   in what it differs from its source
    calibrate    by default what suits the model and the preset, see `settle`
    stages       in the order in which they run
    expect       what `reproduce` compares the scores with
    control      the recipe, usually of the unquantised model, that has to hold before this one means anything
    """

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    model: ModelName
    description: str = ""
    source: str = ""
    deviations: tuple[str, ...] = ()
    calibrate: CalibrationSettings | None = None
    stages: tuple[Step, ...] = Field(min_length=1)
    expect: tuple[Expectation, ...] = ()
    control: str | None = None

    @model_validator(mode="after")
    def _one_model_each(self) -> Self:
        _check_order(self.remaking)
        _check_quantized(self.stages)
        if sum(isinstance(stage, EvaluateStage) for stage in self.stages) > 1:
            raise ValueError("a recipe evaluates once, all tasks together: `evaluate` may stand in `stages` once")
        for name in self.formats:
            if self.formats.count(name) > 1:
                raise ValueError(f"format `{name}` would be written twice")
        if wrong := list(self._never_measured()):
            raise ValidationError.from_exception_data(type(self).__name__, wrong)
        return self

    def _never_measured(self) -> Iterator[InitErrorDetails]:
        """Expected numbers with which nothing could be compared when all stages are done."""
        measured = ", ".join(self.tasks) or "nothing"
        beside = any(isinstance(stage, EvaluateStage) and stage.baseline for stage in self.stages)
        for number, (task, metric) in enumerate((each.task, each.metric) for each in self.expect):
            place, rule = ("expect", number, "metric"), ""
            if task not in self.tasks:
                told = f"`expect` names task `{task}`, which no stage measures; measured: {measured}"
                yield complaint(("expect", number, "task"), told)
            elif metric is None:
                continue
            elif not metric.strip():
                rule = "no metric is named; leave `metric` out for the first one of the task"
            elif task.startswith("ppl:") and metric not in OF_TEXTS:
                rule = f"`expect` names metric `{metric}`, which no text has; known: {', '.join(OF_TEXTS)}"
            elif metric in BESIDE_ANOTHER and not task.startswith("ppl:"):
                rule = f"`expect` names metric `{metric}`, which only texts have (`ppl:...`), and not `{task}`"
            elif metric in BESIDE_ANOTHER and not beside:
                rule = f"`expect` names metric `{metric}`, and `evaluate` has no `baseline` to measure it by"
            if rule:
                yield complaint(place, rule, metric)

    @property
    def quantize(self) -> QuantizeSettings | None:
        """The stage that makes the quantised model."""
        return next((stage for stage in self.stages if isinstance(stage, QuantizeSettings)), None)

    @property
    def remaking(self) -> tuple[Stage, ...]:
        """The stages that make another model, in their order."""
        return tuple(stage for stage in self.stages if stage.remakes)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Everything that the recipe measures."""
        return tuple(task for stage in self.stages if isinstance(stage, EvaluateStage) for task in stage.tasks)

    @property
    def formats(self) -> tuple[str, ...]:
        """How the quantised models that the run writes are stored, in this order."""
        made = (self.quantize.format,) if self.quantize else ()
        return made + tuple(name for stage in self.stages if isinstance(stage, ExportStage) for name in stage.formats)

    @property
    def made(self) -> tuple[str, ...]:
        """What the run writes, in this order; each is a model directory of its own."""
        dense = tuple(name for stage in self.remaking if stage is not self.quantize for name in stage.makes)
        return dense + self.formats

    @property
    def scheme(self) -> str:
        """How the weights are stored: bits and what shares a scale, whether half of them are zero, and FP8 activations.

        As far as the recipe decides it: what is finetuned alone stays what it was.
        """
        if self.quantize is None:
            zeros = "2of4-" if any(isinstance(stage, PruneSettings) for stage in self.stages) else ""
            return "-".join(self.formats) or next((f"{zeros}{name}" for name in reversed(self.made)), "")
        size = self.quantize.group_size
        bits = "int4-channel" if size == -1 else f"int4-{size}" if size == "auto" else f"int4-g{size}"
        bits += "-fp8" if self.quantize.activations == "fp8" else ""
        return bits if self.quantize.sparsity is None else f"2of4-{bits}"

    def dump(self) -> str:
        """As YAML, with every setting written out."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["stages"] = [{"stage": stage["stage"], **stage} for stage in content["stages"]]
        return recipe_yaml.dump({key: value for key, value in content.items() if value not in ("", [])})


def _check_order(remaking: tuple[Stage, ...]) -> None:
    """Each at most once, each after what it builds on, and nothing undone by what follows."""
    names = [stage.stage for stage in remaking]
    order = {"prune": "prunes", "finetune": "finetunes", "quantize": "quantises"}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"a recipe {order[name]} once: `{name}` may stand in `stages` once")
    first = names.index("quantize") if "quantize" in names else len(names)
    if names != sorted(names, key=list(order).index) and names not in (
        ["quantize", "finetune"],
        ["prune", "quantize", "finetune"],
    ):
        raise ValueError(
            f"`stages` has {', then '.join(names)}: the order is {', '.join(order)}; what is quantised can be finetuned too"
        )
    if 0 < first < len(names) and isinstance(stage := remaking[first], QuantizeSettings) and stage.sparsity is None:
        raise ValueError(f"`quantize` after `{names[first - 1]}` would lose the zeros: give it `sparsity: keep`")


ABOUT_CODES = (ExportStage, VerifyStage)
"""Stages that a model which is not quantised is nothing for."""


def _check_quantized(stages: tuple[Stage, ...]) -> None:
    """What is about codes comes after `quantize`; without that, codes can only be those of the model that the recipe names."""
    names = [stage.stage for stage in stages]
    for number, stage in enumerate(stages):
        before = names[:number]
        if isinstance(stage, ABOUT_CODES) and "quantize" not in before and ("quantize" in names or "prune" in before):
            where = "put it after `quantize`" if "quantize" in names else "nothing quantises it"
            raise ValueError(f"`{stage.stage}` comes where the model is not quantised: {where}")


def settle(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Choose the calibration that nobody chose, and say so.

    The embedded model gets the embedded text, the paper's preset what the paper took, everything else C4.
    """
    stage = recipe.quantize
    if not any(each.needs_data for each in recipe.remaking):
        names = " and ".join(each.choice for each in recipe.remaking)
        told = f"{names} looks at no data" if names else "no stage looks at calibration text"
        notes = [f"{told}: calibration settings have no effect"] if recipe.calibrate is not None else []
        return recipe.model_copy(update={"calibrate": None}), notes
    given = recipe.calibrate.model_dump(exclude_unset=True) if recipe.calibrate else {}
    if "source" in given:
        chosen: dict[str, Any] = {}
    elif recipe.model != "demo" and stage and stage.preset == "marlin":
        chosen = {"source": "redpajama", "num_samples": PAPER_DOCUMENTS}
    else:
        chosen = {"source": usual_source(recipe.model)}
    if "num_samples" not in given and {**chosen, **given}["source"] == "demo":
        chosen["num_samples"] = DEMO_WINDOWS
    elif "num_samples" not in given and all(isinstance(each, FinetuneSettings) for each in recipe.remaking):
        chosen |= _enough_to_learn_from(recipe, given.get("seqlen") or longest_window(recipe.model, TRAINING_LENGTH))
    settings = CalibrationSettings.model_validate({**chosen, **given})
    shape = counted(settings.num_samples, "sample") + (f" of {settings.seqlen} tokens" if settings.seqlen else "")
    notes = [f"calibrating on `{settings.source}`, {shape}; choose with `--calib` and `--num-samples`"] if chosen else []
    return recipe.model_copy(update={"calibrate": settings}), notes


def usual_source(model: str) -> str:
    """What a model reads when nobody says what."""
    return "demo" if model == "demo" else "c4"


def longest_window(model: str, usual: int) -> int:
    """The usual length of a window, or as many positions as the model has; one that is not found is told of by the plan."""
    try:
        return min(usual, expected_tokens(CalibrationSettings(shape="packed"), sketch(model, None))[1])
    except ModelError:
        return usual


def _enough_to_learn_from(recipe: Recipe, length: int) -> dict[str, int]:
    """Text of which nothing need be read twice, within limits; a text that has less is read more often."""
    asked = [-(-(each.tokens or 0) // length) + each.held_out for each in recipe.stages if isinstance(each, FinetuneSettings)]
    return {"num_samples": min(max(TRAINING_WINDOWS, *asked), MOST_WINDOWS), "seqlen": length, "fewer": True}


def build(data: Mapping[str, Any], origins: Mapping[tuple[str | int, ...], str]) -> Recipe:
    """A recipe from plain data; `origins` says for each path which option it comes from."""
    return recipe_yaml.validate(Recipe, Document(dict(data), dict(origins)))
