"""Docstrings as the site shows them: aligned lists of fields become tables, with the type and the default of each field.

A docstring of this project explains fields in lines of the form `name   meaning`, which Markdown would run together.
mkdocstrings loads the class below; of the package nothing is imported or run.
"""

import html
import re
from typing import Any

import griffe

ROW = re.compile(r"^(\w[\w, ]*?)(?: {2,})(\S.*)$")


def rows(paragraph: str) -> list[tuple[str, str]]:
    """The (name, meaning) lines of a paragraph; none if it is anything else."""
    found: list[tuple[str, str]] = []
    for line in paragraph.splitlines():
        if row := ROW.match(line):
            found.append((row[1], row[2]))
        elif found and line.startswith("  "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            return []
    return found


def table(found: list[tuple[str, str]], members: dict[str, Any]) -> str:
    """Fields, with what the class says of them."""
    lines = ["| field | type, default | meaning |", "|---|---|---|"]
    for names, meaning in found:
        kinds = [declared(members[name]) for name in names.split(", ") if name in members]
        lines.append(f"| `{names}` | {'<br>'.join(dict.fromkeys(kinds))} | {meaning.replace('|', '&#124;')} |")
    return "\n".join(lines)


def declared(member: Any) -> str:
    """Type and default of a field."""
    kind = "" if member.annotation is None else code(str(member.annotation))
    value = str(member.value) if getattr(member, "value", None) is not None else ""
    if field := re.match(r"Field\((?:default=)?([^,)=]+)(?:,|\))", value):
        value = field[1]
    elif value.startswith("Field("):
        value = ""
    return f"{kind}, {code(value)}" if value else kind


def code(text: str) -> str:
    """Code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


class Tables(griffe.Extension):
    """Rewrites every docstring that has such a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute that has been read."""
        if obj.docstring is None or obj.is_alias:
            return
        members = {name: each for name, each in obj.members.items() if not each.is_alias and each.is_attribute}
        paragraphs = obj.docstring.value.split("\n\n")
        shown = [table(found, members) if (found := rows(each)) else each for each in paragraphs]
        obj.docstring.value = "\n\n".join(shown)
