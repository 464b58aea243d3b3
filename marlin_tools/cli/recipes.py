"""Recipes: `run` one, `reproduce` what several expect; list, show, copy and check them."""

from pathlib import Path
from typing import Annotated

import typer

from marlin_tools.cli import ui
from marlin_tools.cli.complete import recipes as recipe_words
from marlin_tools.cli.options import (
    PLAIN,
    DryRun,
    Json,
    Output,
    Overwrite,
    Resume,
    Strict,
    argument,
    destination,
    flag,
    option,
)
from marlin_tools.cli.perform import perform
from marlin_tools.errors import OutputError, RecipeError

app = typer.Typer(**PLAIN)
recipes = typer.Typer(help="List, show, copy and check recipes.", **PLAIN)


@app.command()
def run(
    recipe: Annotated[str, argument("RECIPE", "A YAML file, or the name of a bundled recipe.", recipe_words)],
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
    from marlin_tools.recipe.files import load

    again = {"resume": resume, "overwrite": overwrite, "start": from_}
    return perform(load(recipe, set_ or ()), output, dry_run=dry_run, strict=strict, as_json=json, **again)


@app.command()
def reproduce(
    refs: Annotated[
        list[str], argument("RECIPE...", "Recipes, rows of tables, or whole tables; names or YAML files.", recipe_words)
    ],
    set_: Annotated[
        list[str] | None, option("--set", of="A.B=C", text="Override a setting of all of them; repeatable.")
    ] = None,
    output: Annotated[Path | None, destination("DIR", "Where the report goes: runs/reproduce/<name>.")] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Run recipes and hold what they measure against what they expect.

    Exits with 1 if a number is outside its tolerance, with 2 if something could not be run.
    """
    from marlin_tools import report
    from marlin_tools.report.comparison import as_text, write_comparison
    from marlin_tools.run.reproduce import collect, home_of, rehearse
    from marlin_tools.run.reproduce import reproduce as compare

    if dry_run:
        home_of(refs, output)
        planned = rehearse(collect(refs, set_ or ()))
        steps = {each.recipe.name: each.describe() for each in planned}
        texts = [f"{each.recipe.name}\n{report.plan(each.describe(), each.notes)}" for each in planned]
        return ui.show(steps, "\n\n".join(texts), as_json=json)
    with ui.Display() as display:
        shown = report.write_pages
        comparison = compare(refs, output, overrides=set_ or (), emit=display, overwrite=overwrite, finished=shown)
    ui.note(f"`{write_comparison(comparison)}` shows it")
    ui.write_json(comparison.describe()) if json else ui.write(as_text(comparison))
    return comparison.code


Name = Annotated[str, argument("NAME", "A bundled recipe.", recipe_words)]


@recipes.command(name="list")
def recipes_list(json: Json = False) -> int:
    """The bundled recipes."""
    from marlin_tools import report
    from marlin_tools.recipe import files as recipe_files

    found = list(recipe_files.overview())
    return ui.show(dict(found), report.facts(found), as_json=json)


@recipes.command(name="show")
def recipes_show(name: Name, json: Json = False) -> int:
    """Print a recipe as it is."""
    from marlin_tools.recipe import files as recipe_files

    if not json:
        ui.write(recipe_files.show(name))
        return 0
    found = recipe_files.load_all(name) if name in recipe_files.tables() else [recipe_files.load(name)]
    ui.write_json([each.model_dump(mode="json", exclude_none=True) for each in found])
    return 0


@recipes.command(name="copy")
def recipes_copy(
    name: Name, to: Annotated[str, argument("FILE", "Where to; a directory keeps the name.")] = ".", json: Json = False
) -> int:
    """Copy a recipe, to be changed."""
    from marlin_tools.checkpoint.output import check_apart, put
    from marlin_tools.recipe import files as recipe_files

    text = recipe_files.show(name)
    if not to:  # as a variable that is not set
        raise OutputError("FILE is empty", hint="name a file or a directory, or leave it out for the one that you are in")
    target = Path(to, f"{name}.yaml") if Path(to).is_dir() else Path(to)
    if target.exists() or target.is_symlink():
        raise OutputError(f"`{target}` exists", hint="choose another name: marlin-tools recipes copy NAME FILE")
    check_apart(target, hint="name another FILE")
    put(target, text)
    return ui.show({"file": str(target)}, str(target), as_json=json)


@recipes.command(name="validate")
def recipes_validate(files: Annotated[list[str], argument("FILE...", "Recipe files.")], json: Json = False) -> int:
    """Check recipes and report all that is wrong with them."""
    from marlin_tools.recipe import files as recipe_files

    problems: list[str] = []
    hint = "`marlin-tools recipes schema` describes every key"
    fine: list[str] = []
    for file in files:
        try:
            count = recipe_files.check(file)
            fine.append(f"{file}: ok" + (f", {count} recipes" if count > 1 else ""))
        except RecipeError as error:
            problems += error.lines
            hint = error.hint or hint
    if problems:
        raise RecipeError.of(problems, hint=hint)
    return ui.show({"ok": files}, "\n".join(fine), as_json=json)


@recipes.command(name="schema")
def recipes_schema(
    table: Annotated[bool, flag("--table", "Of a file with a table of recipes.")] = False,
    json: Annotated[bool, flag("--json", "Print one JSON document, as it does anyway.")] = False,  # noqa: ARG001
) -> int:
    """Print the JSON Schema of recipes, for editors."""
    from marlin_tools.recipe.recipe import Recipe
    from marlin_tools.recipe.table import Table
    from marlin_tools.recipe.yaml_reader import json_schema

    ui.write_json(json_schema(Table if table else Recipe))
    return 0
