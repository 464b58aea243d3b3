"""The verbs that look at what is there: `verify`, `compare`, `inspect` and `doctor`."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import directories as directories_of_results
from marlin_tools.cli.options import PLAIN, Directory, Json, Model, argument, destination, flag, model_directory
from marlin_tools.cli.perform import perform, recipe_of, short_name

app = typer.Typer(**PLAIN)


@app.command()
def verify(
    directory: Directory,
    strict: Annotated[bool, flag("--strict", "Exit with 1 if a check was skipped.")] = False,
    json: Json = False,
) -> int:
    """Check a quantised model, and say which engines load it.

    Exits with 1 if a check fails.
    """
    recipe = recipe_of(short_name(str(directory)), str(directory), [{"stage": "verify"}])
    return perform(recipe, strict=strict, as_json=json)


@app.command()
def compare(
    directories: Annotated[
        list[Path],
        argument(
            "DIR...", "Directories of models, two or more; the first is compared with.", directories_of_results, model_directory
        ),
    ],
    output: Annotated[Path | None, destination("FILE", "Where the page goes: runs/compare/<names>.html.")] = None,
    json: Json = False,
) -> int:
    """Say what differs between results: sizes, scores, losses, settings."""
    from marlin_tools.checkpoint.output import put_page
    from marlin_tools.report import difference as show
    from marlin_tools.run.plan import RUNS

    found = show.compare(directories)
    names = "+".join(re.sub(r"[^\w.+-]+", "-", label).strip("-.") for label in found.labels)[:100]
    place = output or RUNS / "compare" / f"{names}.html"
    put_page(place, show.as_page(found), show.MARK)
    ui.note(f"`{place}` shows it")
    return ui.show(found.describe(), show.as_text(found), as_json=json)


@app.command()
def inspect(model: Model, json: Json = False) -> int:
    """Say what a model directory holds."""
    from marlin_tools import report
    from marlin_tools.verification.inspect import inspect as look
    from marlin_tools.verification.inspect import rows

    document = look(model)
    return ui.show(document, report.facts(rows(document)), as_json=json)


@app.command()
def doctor(json: Json = False) -> int:
    """Say what this machine and this installation can do, and why."""
    from marlin_tools import report
    from marlin_tools.verification.doctor import diagnose

    document = [asdict(fact) for fact in diagnose()]
    return ui.show(document, report.diagnosis(document), as_json=json)
