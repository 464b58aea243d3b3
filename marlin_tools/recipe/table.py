"""A table of recipes in one file: what its rows have in common is written once, what a row is about stands in the row.

    table: llama2-paper
    revisions: {llama2-7b: 01c7f73d771dfac7d292323805ebc428287df4f9}     # what `model: llama2-7b` means below
    recipes:                                   # whole recipes but for name and model
      int4: {stages: [{stage: quantize, preset: marlin}, {stage: evaluate, tasks: ["ppl:wikitext2"]}]}
    rows:
      - name: llama2-7b-marlin                 # runs under this name, like a recipe in a file of its own
        like: int4
        model: llama2-7b
        control: llama2-7b-fp16                # a row above or a bundled recipe that has to hold first
        set: {quantize.damp: 0.05}             # as `--set` would
        expect: [{task: "ppl:wikitext2", value: 5.27, tolerance: 0.03}]

A row becomes a document in which every value still knows its line, so a mistake in a shared recipe is reported where it stands.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Annotated, Any

from pydantic import Field

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.yaml_reader import Document, Path, near, validate
from marlin_tools.settings import Settings

OWN = ("control", "model", "name", "expect")
"""Keys of a row that are keys of its recipe."""


class Row(Settings):
    """One row: a shared recipe on one model, and what is expected of it."""

    name: str
    like: str
    model: str
    description: str = ""
    control: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    expect: tuple[dict[str, Any], ...] = ()


class Table(Settings):
    """The frame of a table file; the recipes in it are checked row by row, as recipes.

    table        its name
    description  one line for `recipes list`
    source       where the expected numbers stand
    deviations   in what every row differs from the source
    revisions    commits of the hub, by model: a row's `model` is taken at this one
    recipes      what rows have in common, by name
    """

    table: str = Field(pattern=r"^[\w][\w.+-]*$")
    description: str = ""
    source: str = ""
    deviations: tuple[str, ...] = ()
    revisions: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] = Field(default_factory=dict)
    recipes: dict[str, dict[str, Any]]
    rows: tuple[Row, ...] = Field(min_length=1)


def schema() -> dict[str, Any]:
    """JSON Schema of table files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Table.model_json_schema()}


def is_table(document: Document) -> bool:
    """Whether a file holds a table rather than one recipe."""
    return "rows" in document.data or "table" in document.data


def check_table(document: Document) -> Table:
    """The frame of a table, or all that is wrong with it."""
    table = validate(Table, document)
    if problems := [f"{document.origin(path, key=True)}: {rule}" for path, rule in _contradictions(table)]:
        raise RecipeError.of(problems)
    return table


def _contradictions(table: Table) -> Iterator[tuple[Path, str]]:
    """What the rows of a table say that cannot be: where, and why."""
    for model in table.revisions.keys() - {row.model for row in table.rows}:
        yield ("revisions", model), f"`{model}` is the model of no row"
    names = [row.name for row in table.rows]
    for number, row in enumerate(table.rows):
        if row.name in names[:number]:
            yield ("rows", number, "name"), f"row `{row.name}` stands twice"
        if row.like not in table.recipes:
            yield ("rows", number, "like"), f"row `{row.name}` is like `{row.like}`; {near(row.like, list(table.recipes))}"
        if row.control in names[number:]:
            yield ("rows", number, "control"), f"row `{row.name}`: its control `{row.control}` does not stand above it"


def expand(document: Document, table: Table, row: Row) -> tuple[Document, list[tuple[str, Any, str]]]:
    """The recipe of a row as a document, and what the row's `set` asks for: (path, value, origin)."""
    number = table.rows.index(row)
    recipe = Document({}, {(): document.origin(("rows", number))})
    for key, value in table.recipes[row.like].items():
        _take(document, ("recipes", row.like, key), recipe, key, value)
    for key in OWN:
        if key in document.data["rows"][number]:
            _take(document, ("rows", number, key), recipe, key, document.data["rows"][number][key])
    if row.model in table.revisions:
        recipe.data["model"] = f"{row.model}@{table.revisions[row.model]}"
    shared = recipe.data
    described = row.description or shared.get("description", "")
    notes = [*table.deviations, *shared.get("deviations", ()), *row.deviations]
    if len(notes) != len(set(notes)):
        raise RecipeError(
            f"{document.origin(('rows', number))}: a deviation stands twice", hint="write it once, where it is shared"
        )
    for key, told in (("description", described), ("source", shared.get("source") or table.source), ("deviations", notes)):
        if told:
            recipe.data[key] = told
    overrides = [(path, value, document.origin(("rows", number, "set", path))) for path, value in row.set.items()]
    return recipe, overrides


def _take(source: Document, path: Path, target: Document, key: str, value: Any) -> None:
    """Copy one section with everything that is known about where it stands."""
    target.data[key] = deepcopy(value)
    for mine, theirs in ((target.values, source.values), (target.keys, source.keys)):
        mine |= {(key, *rest): origin for rest, origin in _below(theirs, path)}


def _below(origins: dict[Path, str], path: Path) -> Iterator[tuple[Path, str]]:
    """What lies at and under `path`, relative to it."""
    for place, origin in origins.items():
        if place[: len(path)] == path:
            yield place[len(path) :], origin
