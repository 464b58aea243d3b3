"""From the options of a verb to its result: build the recipe, have the engine run it, print."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_tools.cli import ui
from marlin_tools.errors import check_named

if TYPE_CHECKING:
    from marlin_tools.recipe.recipe import Recipe

_FLAGS = {
    "source": "--calib",
    "formats": "--format",
    "negative_scales": "--no-negative-scales",
    "tuning": "--tune",
    "model": "MODEL",
}
"""Settings whose option has another name than theirs."""


def short_name(model: str) -> str:
    """A model's name without its owner or its parent directories."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


def recipe_of(
    name: str, model: str, stages: list[dict[str, Any]], calibrate: dict[str, Any] | None = None, **flags: str
) -> "Recipe":
    """The recipe that these options describe; a complaint about a value begins with its option, by `flags` if named there."""
    from marlin_tools.recipe.recipe import build

    check_named(model)
    origins: dict[tuple[str | int, ...], str] = {(): "command line"}
    sections = [*((("stages", i), stage) for i, stage in enumerate(stages)), (("calibrate",), calibrate or {})]
    sections += [((*place, "text"), section["text"]) for place, section in sections if "text" in section]
    for place, section in sections:
        origins |= {(*place, key): (_FLAGS | flags).get(key, f"--{key.replace('_', '-')}") for key in section}
    return build(given(name=name, model=model, calibrate=calibrate or None, stages=stages), origins)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the defaults of the settings."""
    return {key: value for key, value in options.items() if value is not None}


def words(text: str | None) -> tuple[str, ...] | None:
    """What stands between commas."""
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def perform(
    recipe: "Recipe",
    output: Path | None = None,
    *,
    dry_run: bool = False,
    strict: bool = False,
    as_json: bool = False,
    **again: Any,
) -> int:
    """Plan and, unless it is a dry run, execute; then print."""
    from marlin_tools import report
    from marlin_tools.distributed.device import leads
    from marlin_tools.events import silent
    from marlin_tools.run.execute import check_outputs, execute, position
    from marlin_tools.run.plan import plan

    with ui.Display() as display:
        planned = plan(recipe, output, dry=dry_run)
        if dry_run:
            position(planned, again.get("start"))
            check_outputs(planned)
        result = None if dry_run else execute(planned, display if leads() else silent, **again)
        steps = report.write_pages(result) if result and leads() else {}
    if not leads():
        return 0
    if result is None:
        stages = planned.describe()
        return ui.show({"steps": stages, "notes": planned.notes}, report.plan(stages, planned.notes), as_json=as_json)
    ui.show(result.describe(), report.summary(result), as_json=as_json)
    for what, command in [step for path in result.outputs[-1:] for step in steps[path][:1]]:
        ui.hint(f"{what[:1].lower()}{what[1:]}: {command}")
    doubtful = result.warnings or any(each.skipped for each in result.verifications.values())
    return int(not result.ok or (strict and bool(doubtful)))
