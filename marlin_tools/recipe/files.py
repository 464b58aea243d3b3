"""From a name or a path to a checked recipe: files with one recipe, tables with a row for each, bundled or the user's own.

A row of a table is a recipe like any other: `marlin-tools run ROW` runs it, `recipes show ROW` prints it written out.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from marlin_tools.checkpoint.strict_json import read_bounded
from marlin_tools.errors import RecipeError, near
from marlin_tools.recipe import yaml_reader as recipe_yaml
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.recipe.table import Table, check_table, extract, is_table
from marlin_tools.recipe.yaml_reader import Document
from marlin_tools.resources import recipes_dir


@dataclass(frozen=True)
class Place:
    """Where a recipe stands: a file, and which row of it if the file is a table."""

    path: Path
    row: str | None = None


def load(ref: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """One recipe, with `a.b=value` overrides; reports all that is wrong with it at once."""
    place = find(ref)
    table, documents = _documents(place.path)
    if table is not None and place.row is None:
        hint = (
            f"run one of its rows ({', '.join(row.name for row in table.rows)}), "
            f"or all of them: marlin-tools reproduce {shlex.quote(str(ref))}"
        )
        raise RecipeError(f"`{ref}` is a table of {len(documents)} recipes", hint=hint)
    return _recipe(documents[place.row], overrides)


def load_all(ref: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """What is named, a recipe or all rows of a table, each after the control that it has.

    An override of a stage goes to the recipes that have this stage; it is an error if none has it.
    """
    overrides = tuple(overrides)
    recipes = list(_with_controls(find(ref), overrides).values())
    there = {stage.stage for recipe in recipes for stage in recipe.stages}
    for override in overrides:
        head = override.partition("=")[0].partition(".")[0]
        if head in _stage_names() - there:
            raise RecipeError(
                f"`--set {override}`: no recipe here has a stage `{head}`", hint=f"there are: {', '.join(sorted(there))}"
            )
    return recipes


@cache
def _stage_names() -> frozenset[str]:
    """Every word that can stand after `stage:`."""
    return frozenset(recipe_yaml.json_schema(Recipe)["properties"]["stages"]["items"]["discriminator"]["mapping"])


def _fitting(document: Document, overrides: Iterable[str]) -> list[str]:
    """The overrides without those of stages that a recipe does not have."""
    stages = document.data.get("stages")
    there = {stage.get("stage") for stage in stages if isinstance(stage, dict)} if isinstance(stages, list) else set()
    absent = _stage_names() - there
    return [override for override in overrides if override.partition("=")[0].partition(".")[0] not in absent]


def _with_controls(place: Place, overrides: tuple[str, ...]) -> dict[str, Recipe]:
    """By name, in the order in which they have to run; reports all that is wrong with controls at once."""
    _, documents = _documents(place.path)
    found: dict[str, Recipe] = {}
    wrong: list[RecipeError] = []
    for row in [place.row] if place.row else documents:
        document = documents[row]
        recipe = _recipe(document, _fitting(document, overrides))
        try:
            if recipe.control is not None:
                told = f"{document.origin(('control',), key=True)}: recipe `{recipe.name}`: its control `{recipe.control}`"
                above = Place(place.path, recipe.control) if recipe.control in documents else _bundled(recipe.control, told)
                brought = [found[recipe.control]] if recipe.control in found else _with_controls(above, overrides).values()
                for each in brought:
                    add(found, each, told)
                _check_measures([*brought][-1], told)
            add(found, recipe, f"{document.origin(('name',), key=True)}: recipe `{recipe.name}`")
        except RecipeError as error:
            wrong.append(error)
    if wrong:
        raise RecipeError.of([line for error in wrong for line in error.lines], hint=wrong[0].hint)
    return found


def _check_measures(control: Recipe, told: str) -> None:
    """Refuse a control that would run and never hold."""
    if not control.tasks:
        raise RecipeError(f"{told} measures nothing, so it never holds", hint="give it a stage `evaluate`")


def _bundled(control: str, told: str) -> Place:
    """Where the bundled recipe stands that has to hold first; `told` begins what is said if there is none."""
    known = catalog()
    if control not in known:
        rest = near(control, known, "`marlin-tools recipes list` names all of them")
        raise RecipeError(f"{told} is no row beside it and no bundled recipe; {rest}")
    place = known[control]
    if rows := [name for name, each in known.items() if each.row and each.path == place.path and not place.row]:
        raise RecipeError(f"{told} is a table; name one of its rows: {', '.join(rows)}")
    return place


def add(found: dict[str, Recipe], recipe: Recipe, told: str = "") -> None:
    """One more, under its name; `told` begins what is said if another is called so, whose result would be taken for its own."""
    if found.setdefault(recipe.name, recipe) != recipe:
        raise RecipeError(
            f"{told}: two different recipes are called `{recipe.name}`".removeprefix(": "),
            hint="rename yours, or reproduce them one by one",
        )


def check(ref: str | Path) -> int:
    """Read a file or a bundled recipe and everything in it; how many recipes that are, or all that is wrong with them."""
    path = find(ref).path
    _with_controls(Place(path), ())
    return len(_documents(path)[1])


def find(ref: str | Path) -> Place:
    """The place of a recipe or table: a path, a bundled name, or a row of a bundled table."""
    path = Path(ref)
    if path.is_file():
        return Place(path)
    known = catalog()
    if str(ref) not in known and (path / "recipe.yaml").is_file():
        raise RecipeError(f"`{ref}` is a directory", hint=f"name the recipe in it: `{path / 'recipe.yaml'}`")
    if str(ref) not in known:
        hint = near(str(ref), known, "`marlin-tools recipes list` names all of them")
        raise RecipeError(f"`{ref}` is no recipe file and no bundled recipe", hint=hint)
    return known[str(ref)]


def bundled() -> dict[str, Path]:
    """The files that ship with the package, recipes and tables, by name."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"), key=lambda path: path.stem)}


def tables() -> dict[str, Table]:
    """The bundled tables by name."""
    return {name: table for name, path in bundled().items() if (table := _documents(path)[0])}


@cache
def catalog() -> dict[str, Place]:
    """Everything bundled that has a name: files, then the rows of tables."""
    files = {name: Place(path) for name, path in bundled().items()}
    return files | {row.name: Place(files[name].path, row.name) for name, table in tables().items() for row in table.rows}


def overview() -> list[tuple[str, str]]:
    """For people: every bundled file and what it is for, the rows of tables beneath it with their models."""
    known = tables()
    lines = []
    for name, path in bundled().items():
        if name not in known:
            lines.append((name, load(path).description))
            continue
        table = known[name]
        lines.append((name, f"{len(table.rows)} recipes: {table.description}"))
        lines += [(f"  {row.name}", f"{row.model.partition('@')[0]}: {row.description}") for row in table.rows]
    return lines


def show(ref: str | Path) -> str:
    """A file as it is, or a row of a table as the recipe that it stands for."""
    place = find(ref)
    return place.path.read_text(encoding="utf-8") if place.row is None else load(ref).dump()


def _documents(path: Path) -> tuple[Table | None, dict[str | None, Document]]:
    """The table that a file is, if it is one, and every recipe in it by the name of its row."""
    hint = "recipes are UTF-8 text files"
    try:
        text = read_bounded(path, RecipeError, hint, limit=4 * recipe_yaml.LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"`{path}` cannot be read: no UTF-8 at byte {error.start}", hint=hint) from error
    document = recipe_yaml.parse(text, str(path))
    if not is_table(document):
        return None, {None: document}
    table = check_table(document)
    return table, {row.name: extract(document, table, number) for number, row in enumerate(table.rows)}


def _recipe(document: Document, overrides: Iterable[str]) -> Recipe:
    for override in overrides:
        _override(document, override)
    recipe = recipe_yaml.validate(Recipe, document)
    if recipe.control == recipe.name:
        raise RecipeError(f"{document.origin(('control',), key=True)}: recipe `{recipe.name}` is its own control")
    return recipe


def _override(document: Document, text: str) -> None:
    """`quantize.damp=0.05`: a path of keys and indices, where the name of a stage stands for its place in `stages`."""
    name, separator, value = text.partition("=")
    origin = f"--set {text}"
    if not separator or not all(name.split(".")):
        raise RecipeError(f"`{origin}`: not of the form `a.b=value`", hint="for example: --set quantize.damp=0.05")
    path: tuple[str | int, ...] = tuple(map(_key, name.split(".")))
    stages = document.data.get("stages")
    if isinstance(stages, list) and path[0] not in Recipe.model_fields:
        names = [stage.get("stage") if isinstance(stage, dict) else None for stage in stages]
        if path[0] not in names:
            known = [*Recipe.model_fields, *dict.fromkeys(name for name in names if isinstance(name, str))]
            raise RecipeError(f"{origin}: unknown key `{path[0]}`; {near(str(path[0]), known)}")
        path = ("stages", names.index(path[0]), *path[1:])
    document.put(path, recipe_yaml.parse_value(value), origin)


def _key(part: str) -> str | int:
    """A word or a place in a list, of which none has ten digits; Python reads no number of thousands."""
    return int(part) if part.isdecimal() and len(part) < 10 else part
