"""A table of recipes in one file: every row is a whole recipe, and what rows share is written once with YAML's own means.

table: llama2-paper
shared:                                    # read nowhere else; `&name` names a part, `*name` and `<<: *name` take it in
  models: [&llama2-7b llama2-7b@01c7f73d771dfac7d292323805ebc428287df4f9]
  int4: &int4
    stages: [{stage: quantize, preset: marlin}, {stage: evaluate, tasks: ["ppl:wikitext2"]}]
rows:
  - <<: *int4
    name: llama2-7b-marlin                 # runs under this name, like a recipe in a file of its own
    model: *llama2-7b
    control: llama2-7b-fp16                # a row above or a bundled recipe that has to hold first
"""

from copy import deepcopy
from typing import Any

from pydantic import Field

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.recipe.yaml_reader import Document, validate
from marlin_tools.settings import Settings


class Table(Settings):
    """A table file; `source` and `deviations` are those of every row, `description` is one line for `recipes list`."""

    table: str = Field(pattern=r"^[\w][\w.+-]*$")
    description: str = ""
    source: str = ""
    deviations: tuple[str, ...] = ()
    shared: Any = None
    rows: tuple[Recipe, ...] = Field(min_length=1)


def is_table(document: Document) -> bool:
    """Whether a file holds a table rather than one recipe."""
    return "rows" in document.data or "table" in document.data


def check_table(document: Document) -> Table:
    """The table, or all that is wrong with it."""
    table = validate(Table, document)
    problems = []
    names = [row.name for row in table.rows]
    for number, row in enumerate(table.rows):
        if row.name in names[:number]:
            problems.append(f"{document.origin(('rows', number, 'name'), key=True)}: row `{row.name}` stands twice")
        if row.control in names[number:]:
            place = document.origin(("rows", number, "control"), key=True)
            problems.append(f"{place}: row `{row.name}`: its control `{row.control}` does not stand above it")
    if problems:
        raise RecipeError.of(problems)
    return table


def extract(document: Document, table: Table, number: int) -> Document:
    """A row as a document of its own, in which every value still knows its place."""
    data = deepcopy(document.data["rows"][number])
    data["source"] = data.get("source") or table.source
    data["deviations"] = [*table.deviations, *data.get("deviations", ())]
    values, keys = (
        {path[2:]: origin for path, origin in places.items() if path[:2] == ("rows", number)}
        for places in (document.values, document.keys)
    )
    return Document(data, values, keys)
