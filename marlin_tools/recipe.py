"""A recipe: one model and the stages it goes through, as one checked value.

Every verb of the command line builds a recipe, every file in `recipes/` is one, and every output directory holds the one that
made it, so there is a single way in which anything is run. A stage is the settings of its module and the word `stage`:

    name: demo
    model: demo
    calibrate: {source: demo}
    stages:
      - {stage: quantize, preset: default}
      - {stage: evaluate, tasks: [demo_qa], baseline: demo}

Read next: `run.py`, which plans and executes it; `recipe_yaml.py`, which says what is wrong and where.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from marlin_tools import recipe_yaml
from marlin_tools.errors import RecipeError
from marlin_tools.formats import FORMATS
from marlin_tools.recipe_yaml import Document, near
from marlin_tools.resources import recipes_dir
from marlin_tools.settings import Settings
from marlin_tools.stages.calibrate import CalibrationSettings
from marlin_tools.stages.evaluate import EvaluateSettings
from marlin_tools.stages.generate import GenerateSettings
from marlin_tools.stages.quantize import QuantizeSettings

PAPER_DOCUMENTS = 256
"""How many documents the paper calibrates on."""

DEMO_WINDOWS = 64
"""How many windows of 1024 tokens the embedded text surely has."""


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"unknown format `{name}`; known: {', '.join(FORMATS)}")
    return name


class QuantizeStage(QuantizeSettings):
    """Quantise the model; calibration is a section of its own."""

    stage: Literal["quantize"]

    _format = field_validator("format")(_known_format)

    @property
    def settings(self) -> QuantizeSettings:
        """What the stage function takes."""
        return QuantizeSettings.model_validate(self.model_dump(exclude={"stage"}))


class ExportStage(Settings):
    """Write the quantised model in other formats."""

    stage: Literal["export"]
    formats: tuple[Annotated[str, AfterValidator(_known_format)], ...] = Field(min_length=1)


class EvaluateStage(EvaluateSettings):
    """Measure the model, and `baseline` as well, if one is named."""

    stage: Literal["evaluate"]
    baseline: str | None = None

    @property
    def settings(self) -> EvaluateSettings:
        """What the stage function takes."""
        return EvaluateSettings.model_validate(self.model_dump(exclude={"stage", "baseline"}))


class VerifyStage(Settings):
    """Check every directory that the run has written, or the model itself if it has written none."""

    stage: Literal["verify"]


class GenerateStage(GenerateSettings):
    """Continue a text."""

    stage: Literal["generate"]
    prompt: str

    @property
    def settings(self) -> GenerateSettings:
        """What the stage function takes."""
        return GenerateSettings.model_validate(self.model_dump(exclude={"stage", "prompt"}))


Stage = QuantizeStage | ExportStage | EvaluateStage | VerifyStage | GenerateStage


class Recipe(Settings):
    """One model and what happens to it.

    name         names the output: `runs/<name>-<scheme>`
    model        a directory, a hub id or an alias
    description  one line for `recipes list`
    source       where the settings come from, and in what they deviate from it
    calibrate    by default what suits the model and the preset, see `settle`
    stages       in the order in which they run
    """

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    model: str
    description: str = ""
    source: str = ""
    calibrate: CalibrationSettings | None = None
    stages: tuple[Annotated[Stage, Field(discriminator="stage")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_model_each(self) -> Self:
        if sum(isinstance(stage, QuantizeStage) for stage in self.stages) > 1:
            raise ValueError("a recipe quantises once: `quantize` may stand in `stages` once")
        for name in self.formats:
            if self.formats.count(name) > 1:
                raise ValueError(f"format `{name}` would be written twice")
        return self

    @property
    def quantize(self) -> QuantizeStage | None:
        """The stage that makes the quantised model."""
        return next((stage for stage in self.stages if isinstance(stage, QuantizeStage)), None)

    @property
    def formats(self) -> tuple[str, ...]:
        """What the run writes, in this order; each is a model directory of its own."""
        made = (self.quantize.format,) if self.quantize else ()
        return made + tuple(name for stage in self.stages if isinstance(stage, ExportStage) for name in stage.formats)

    @property
    def scheme(self) -> str:
        """How the weights are stored: bits and what shares a scale."""
        if self.quantize is None:
            return "-".join(self.formats)
        return "int4-channel" if self.quantize.group_size == -1 else f"int4-g{self.quantize.group_size}"

    def dump(self) -> str:
        """As YAML, with every setting written out."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["stages"] = [{"stage": stage["stage"], **stage} for stage in content["stages"]]
        return recipe_yaml.dump({key: value for key, value in content.items() if value != ""})


def settle(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Choose the calibration that nobody chose, and say so.

    The embedded model gets the embedded text, the paper's preset what the paper took, everything else C4.
    """
    stage = recipe.quantize
    if stage is None or not stage.solver.needs_data:
        unused = recipe.calibrate is not None and stage is not None
        notes = [f"preset `{stage.preset}` looks at no data: calibration settings have no effect"] if stage and unused else []
        return recipe.model_copy(update={"calibrate": None}), notes
    given = recipe.calibrate.model_dump(exclude_unset=True) if recipe.calibrate else {}
    if "source" in given:
        chosen: dict[str, Any] = {}
    elif recipe.model == "demo":
        chosen = {"source": "demo"}
    elif stage.preset == "marlin":
        chosen = {"source": "redpajama", "num_samples": PAPER_DOCUMENTS}
    else:
        chosen = {"source": "c4"}
    if "num_samples" not in given and {**chosen, **given}["source"] == "demo":
        chosen["num_samples"] = DEMO_WINDOWS
    settings = CalibrationSettings.model_validate({**chosen, **given})
    shape = f"{settings.num_samples} samples" + (f" of {settings.seqlen} tokens" if settings.seqlen else "")
    notes = [f"calibrating on `{settings.source}`, {shape}; choose with `--calib` and `--num-samples`"] if chosen else []
    return recipe.model_copy(update={"calibrate": settings}), notes


def load(ref: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or a bundled one by its name, with `a.b=value` overrides; reports all that is wrong at once."""
    path = find(ref)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"`{path}` cannot be read: {error}") from error
    document = recipe_yaml.parse(text, str(path))
    for override in overrides:
        _override(document, override)
    return recipe_yaml.validate(Recipe, document)


def build(data: Mapping[str, Any], origins: Mapping[tuple[str | int, ...], str]) -> Recipe:
    """A recipe from plain data; `origins` says for each path which option it comes from."""
    return recipe_yaml.validate(Recipe, Document(dict(data), dict(origins)))


def bundled() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"), key=lambda path: path.stem)}


def find(ref: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a bundled one."""
    path = Path(ref)
    if path.is_file():
        return path
    known = bundled()
    if str(ref) not in known:
        raise RecipeError(f"`{ref}` is no recipe file and no bundled recipe", hint=near(str(ref), list(known)))
    return known[str(ref)]


def schema() -> dict[str, Any]:
    """JSON Schema of recipe files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _override(document: Document, text: str) -> None:
    """`quantize.damp=0.05`: a path of keys and indices; the name of a stage stands for its place in `stages`."""
    name, separator, value = text.partition("=")
    origin = f"--set {text}"
    if not separator or not all(name.split(".")):
        raise RecipeError(f"`{origin}`: not of the form `a.b=value`", hint="for example: --set quantize.damp=0.05")
    path: tuple[str | int, ...] = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    stages = document.data.get("stages")
    if isinstance(stages, list) and path[0] not in Recipe.model_fields:
        places = [index for index, stage in enumerate(stages) if isinstance(stage, dict) and stage.get("stage") == path[0]]
        if places:
            path = ("stages", places[0], *path[1:])
    document.put(path, recipe_yaml.parse_value(value), origin)
