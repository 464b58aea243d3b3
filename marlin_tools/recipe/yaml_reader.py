"""YAML 1.2 that remembers where everything stands, and complaints that say so: `file:line:column: what is wrong`.

Knows nothing of recipes: any pydantic model can be read with it. A value has an *origin*, which is a place in a file, the
`--set` that put it there, or the command-line option that it came from; every complaint begins with the origin.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from marlin_tools.errors import RecipeError

Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Document:
    """Plain data, and by path where each value and each key of it comes from."""

    data: dict[str, Any]
    values: dict[Path, str] = field(default_factory=dict)
    keys: dict[Path, str] = field(default_factory=dict)

    def origin(self, path: Path, *, key: bool = False) -> str:
        """The place of the innermost thing on `path` that has one."""
        if key and path in self.keys:
            return self.keys[path]
        return next((self.values[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.values), "")

    def put(self, path: Path, value: Any, origin: str) -> None:
        """Set one value, making the sections on the way to it; `origin` is what a complaint about it will begin with."""
        place: Any = self.data
        for end in range(1, len(path)):
            part, here = path[end - 1], path[:end]
            if isinstance(place, dict) and part not in place:
                place[part] = {}
                self.values[here] = self.keys[here] = origin
            place = _enter(place, part, here, origin) if isinstance(place, list) else place[part]
            if not isinstance(place, dict | list):
                raise RecipeError(f"{origin}: `{dotted(here)}` has no parts that could be set")
        if isinstance(place, list):
            _enter(place, path[-1], path, origin)
        place[path[-1]] = value
        for known in [known for known in self.values if known[: len(path)] == path]:
            del self.values[known]
        self.values[path] = self.keys[path] = origin


def parse(text: str, file: str) -> Document:
    """Read one YAML mapping."""
    try:
        data = YAML(typ="safe", pure=True).load(text)
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise RecipeError(f"{place}: {error.problem or error.context}", hint="recipes are plain YAML 1.2") from error
    except YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {str(error).splitlines()[0]}", hint="recipes are plain YAML 1.2") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file}:1:1: expected `key: value` lines", hint="`marlin-tools recipes show demo` prints a recipe")
    document = Document(data, {(): f"{file}:1:1"})
    for path, key, value in _walk(root, ()):
        document.keys[path] = _place(file, key)
        document.values[path] = _place(file, value)
    return document


def parse_value(text: str) -> Any:
    """One value as YAML reads it: `0.05`, `true`, `[a, b]`, `word`."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"`{text}` is no YAML value", hint="quote it: --set 'model=\"a: b\"'") from error


def dump(data: Mapping[str, Any]) -> str:
    """Block style, keys in the order given."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    stream = StringIO()
    yaml.dump(dict(data), stream)
    return stream.getvalue()


def validate(model: type[Model], document: Document) -> Model:
    """The checked value, or one error with every complaint in the order of the file."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        schema = model.model_json_schema()
        errors = error.errors(include_url=False)
        problems: dict[str, str] = {}
        for each in errors:
            if any(other is not each and other["loc"][: len(each["loc"])] == each["loc"] for other in errors):
                continue  # only says that what lies inside is wrong
            place, rule = _complaint(dict(each), document, schema)
            problems[place] = f"{problems[place]}, or {rule}" if place in problems else rule
        lines = sorted((f"{place}{rule}" for place, rule in problems.items()), key=position)
        raise RecipeError("\n".join(lines)) from error


def dotted(path: Path) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))


def near(word: str, known: list[str]) -> str:
    """`did you mean ...?` if something is near, and what there is."""
    close = get_close_matches(word, known, n=1)
    return (f"did you mean `{close[0]}`? " if close else "") + f"known: {', '.join(known)}"


def _enter(place: list[Any], part: str | int, path: Path, origin: str) -> Any:
    if not isinstance(part, int) or not 0 <= part < len(place):
        hint = f"`{dotted(path[:-1])}` has {len(place)} items, counted from 0"
        raise RecipeError(f"{origin}: there is no `{dotted(path)}`", hint=hint)
    return place[part]


def _walk(node: Node, path: Path) -> Iterator[tuple[Path, Node, Node]]:
    """(path, key node, value node) of everything inside `node`."""
    if isinstance(node, MappingNode):
        children = [((*path, key.value), key, value) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        children = [((*path, index), value, value) for index, value in enumerate(node.value)]
    else:
        children = []
    for child, key, value in children:
        yield child, key, value
        yield from _walk(value, child)


def _place(file: str, node: Node) -> str:
    return f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def position(complaint: str) -> tuple[int, ...]:
    """Line and column; complaints about overrides and options come first, as they were found."""
    found = re.search(r":(\d+):(\d+):", complaint)
    return tuple(map(int, found.groups())) if found else (0, 0)


def _complaint(error: dict[str, Any], document: Document, schema: dict[str, Any]) -> tuple[str, str]:
    """(place and subject, what is wrong with it) of one pydantic error; alternatives of a union have the former in common."""
    kind = error["type"]
    path, section, known = _follow(error["loc"], document.data, schema)
    name, inside = dotted(path[-1:]), f" in `{section}`" if section else ""
    if kind == "extra_forbidden":
        return f"{document.origin(path, key=True)}: unknown key `{name}`{inside}; ", near(name, known)
    if kind == "missing":
        return f"{document.origin(path)}: `{error['loc'][-1]}` is missing{inside}", ""
    if kind.startswith("union_tag"):
        key, tag = error["ctx"]["discriminator"].strip("'"), error["ctx"].get("tag")
        if tag is None:
            return f"{document.origin(path)}: `{key}` is missing; ", f"known: {', '.join(known)}"
        return f"{document.origin((*path, key))}: unknown {key} `{tag}`; ", near(tag, known)
    rule = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        rule, separator, names = rule.partition("; known: ")
        return f"{document.origin(path)}: ", f"{rule}; {near(str(error['input']), names.split(', '))}" if separator else rule
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        rule = f"must have at least {least} item{'s' if least > 1 else ''}"
    rule = rule.replace("Input should", "must").replace("tuple", "list")
    origin = document.origin(path)
    is_option = origin.startswith("--") and " " not in origin
    shown = f"`{origin} {error['input']}`" if is_option else f"{origin}: `{name}: {error['input']}`"
    return f"{shown}: ", rule[:1].lower() + rule[1:]


def _follow(loc: Path, data: Any, schema: dict[str, Any]) -> tuple[Path, str, list[str]]:
    """Walk data and schema along a pydantic location, which also names tags of unions that are no part of the data.

    Returns the path in the data, the section that it lies in, and the keys (or tags) that are known there.
    """
    definitions = schema.get("$defs", {})
    path: Path = ()
    section, known = "", list(schema["properties"])
    for part in loc:
        if part in _tags(schema):
            schema, section = _resolve({"$ref": _tags(schema)[str(part)]}, definitions), str(part)
        elif isinstance(part, int) and isinstance(data, list):
            path, data, schema = (*path, part), data[part], _resolve(schema.get("items", {}), definitions)
        elif isinstance(data, dict) and part in data:
            path, data, schema = (*path, part), data[part], _resolve(schema.get("properties", {}).get(part, {}), definitions)
            section = str(part) if "properties" in schema else section
        else:
            break
        known = list(schema.get("properties", ())) or list(_tags(schema)) or known
    return path, section, known


def _tags(schema: dict[str, Any]) -> dict[str, str]:
    """The members of a tagged union, by tag."""
    tags: dict[str, str] = schema.get("discriminator", {}).get("mapping", {})
    return tags


def _resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Through `$ref` and `null | X` to what says something."""
    while True:
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rpartition("/")[2]]
        elif "anyOf" in schema:
            schema = next(each for each in schema["anyOf"] if each.get("type") != "null")
        else:
            return schema
