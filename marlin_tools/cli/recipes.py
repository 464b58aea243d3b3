"""Recipes: `run` one; list, show, copy and check them."""

from pathlib import Path
from typing import Annotated

import typer

from marlin_tools.cli.options import PLAIN, DryRun, Json, Output, Overwrite, Resume, Strict, argument, option
from marlin_tools.cli.perform import perform
from marlin_tools.errors import OutputError, RecipeError

app = typer.Typer(**PLAIN)
recipes = typer.Typer(help="List, show, copy and check recipes.", **PLAIN)


@app.command()
def run(
    recipe: Annotated[str, argument("RECIPE", "A YAML file, or the name of a bundled recipe.")],
    set_: Annotated[list[str] | None, option("--set", of="A.B=C", text="Override a setting; repeatable.")] = None,
    from_: Annotated[str | None, option("--from", of="STAGE", text="Keep what earlier stages made, redo the others.")] = None,
    output: Output = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Run a recipe: all stages that are not done yet."""
    from marlin_tools.recipe_files import load

    again = {"resume": resume, "overwrite": overwrite, "start": from_}
    return perform(load(recipe, set_ or ()), output, dry_run=dry_run, strict=strict, as_json=json, **again)


Name = Annotated[str, argument("NAME", "A bundled recipe.")]


@recipes.command(name="list")
def recipes_list() -> int:
    """The bundled recipes."""
    from marlin_tools import recipe_files, report, ui

    ui.write(report.facts(recipe_files.overview()))
    return 0


@recipes.command(name="show")
def recipes_show(name: Name) -> int:
    """Print a recipe as it is."""
    from marlin_tools import recipe_files, ui

    ui.write(recipe_files.show(name))
    return 0


@recipes.command(name="copy")
def recipes_copy(name: Name, to: Annotated[Path, argument("FILE", "Where to; a directory keeps the name.")] = Path()) -> int:
    """Copy a recipe, to be changed."""
    from marlin_tools import recipe_files, ui

    text = recipe_files.show(name)
    target = to / f"{name}.yaml" if to.is_dir() else to
    if target.exists():
        raise OutputError(f"`{target}` exists", hint="choose another name: marlin-tools recipes copy NAME FILE")
    target.write_text(text, encoding="utf-8")
    ui.write(str(target))
    return 0


@recipes.command(name="validate")
def recipes_validate(files: Annotated[list[str], argument("FILE...", "Recipe files.")]) -> int:
    """Check recipes and report all that is wrong with them."""
    from marlin_tools import recipe_files, ui

    problems = []
    for file in files:
        try:
            recipe_files.check(file)
        except RecipeError as error:
            problems.append(error.message)
    if problems:
        raise RecipeError("\n".join(problems), hint="`marlin-tools recipes schema` describes every key")
    ui.write("\n".join(f"{file}: ok" for file in files))
    return 0


@recipes.command(name="schema")
def recipes_schema() -> int:
    """Print the JSON Schema of recipes, for editors."""
    from marlin_tools import recipe, ui

    ui.write_json(recipe.schema())
    return 0
