"""YAML 1.2 that remembers where everything stands, and complaints that say so: `file:line:column: what is wrong`.

Knows nothing of recipes: any pydantic model can be read with it. A value has an *origin*, which is a place in a file, the
`--set` that put it there, or the command-line option that it came from; every complaint begins with the origin.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from itertools import accumulate
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from marlin_tools.errors import MOST, ErrorTranslation, RecipeError, near

DEEPEST = 32
"""Levels of nesting."""

MOST_VALUES = 20_000
"""Values of a document; what an alias stands for counts wherever it stands."""

LARGEST = 64 << 10
"""Characters of a document: ten times the largest table here."""

_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = "recipes are plain YAML 1.2"
_SURROGATE = re.compile("[\ud800-\udfff]")

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
    root = _compose(text, file)
    if not isinstance(root, MappingNode):
        raise RecipeError(f"{file}:1:1: expected `key: value` lines", hint="`marlin-tools recipes show demo` prints a recipe")
    document = Document({}, {(): f"{file}:1:1"})
    for path, key, value in _walk(root, file):
        document.keys[path] = _place(file, key)
        document.values[path] = _place(file, value)
    document.data = _construct(text, file)
    return document


def parse_value(text: str) -> Any:
    """One value as YAML reads it: `0.05`, `true`, `[a, b]`, `word`."""
    try:
        if (root := _compose(text, "--set")) is None:
            return None
        for _ in _walk(root, "--set"):
            pass
        return _construct(text, "--set")
    except RecipeError as error:
        reason = error.message.partition(": ")[2]
        raise RecipeError(f"`{text[:100]}` is no YAML value: {reason}", hint="quote it: --set 'model=\"a: b\"'") from error


def _compose(text: str, file: str) -> Node | None:
    """The nodes of a document with their places; a node that is named and used again is there once."""
    if len(text) > LARGEST:
        raise RecipeError(f"{file}: has {len(text)} characters, at most {LARGEST} are read", hint=_PLAIN)
    deepest = max(accumulate(("[{".count(c) - "]}".count(c) for c in re.sub(r"[^\[\]{}]", "", text)), initial=0))
    if deepest > DEEPEST:
        raise RecipeError(f"{file}: nested deeper than {DEEPEST} levels", hint=_PLAIN)
    with _Refusal(file):
        return _yaml().compose(text)


def _construct(text: str, file: str) -> Any:
    with _Refusal(file):
        return _apart(_yaml().load(text))


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Merging
    return yaml


def _apart(value: Any) -> Any:
    """A copy in which every use of an alias is a value of its own, so that one can be set without the others."""
    if type(value) is int and value.bit_length() > 64:  # thousands of hexadecimal digits, which Python does not print
        raise ValueError("an integer of more than 64 bits")
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


class _Merging(Composer):
    """Puts what `<<` takes in where `<<` stands: what comes after sees keys and values only, each with its place."""

    taken = 0

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader=loader)
        self.warn_double_anchors = False  # YAML allows a name to be given again

    def compose_mapping_node(self, anchor: Any) -> Node:
        node: Node = super().compose_mapping_node(anchor)
        merges = [(key, value) for key, value in node.value if key.tag == _MERGE]
        node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        known = {_name(key) for key, _ in node.value}
        for key, value in merges:
            for part in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(part, MappingNode) or part is node or part.end_mark is None:
                    raise ComposerError(None, None, "`<<` takes mappings that stand above: `<<: *name`", key.start_mark)
                self.taken += len(part.value)
                if self.taken > MOST_VALUES:
                    raise ComposerError(None, None, f"more than {MOST_VALUES} values come from `<<`", key.start_mark)
                new = [(name, inner) for name, inner in part.value if _name(name) not in known]
                known |= {_name(name) for name, _ in new}
                node.value += new
        return node


class _Refusal(ErrorTranslation):
    """What the library raises over a text; its own errors know where."""

    def __init__(self, file: str) -> None:
        super().__init__(RecipeError, f"{file}: not YAML", _PLAIN)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(value, MarkedYAMLError):
            mark = value.problem_mark or value.context_mark
            place = f"{self.what.removesuffix(': not YAML')}:{mark.line + 1}:{mark.column + 1}" if mark else self.what
            raise RecipeError(f"{place}: {value.problem or value.context}", hint=_PLAIN) from value
        super().__exit__(kind, value, trace)


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
        around = {each["loc"][:end] for each in errors for end in range(len(each["loc"]))}
        places = Counter(each["loc"] for each in errors)
        wrong = [each for each in errors if each["loc"] not in around and places[each["loc"]] == 1]
        problems: dict[str, list[str]] = {}
        for each in wrong[: 5 * MOST]:  # what is around others only says that what lies inside is wrong
            place, rule = _complaint(dict(each), document, schema)
            problems.setdefault(place, []).append(rule)
        # a mistake in what several take in is found several times
        lines = sorted((f"{place}{', or '.join(dict.fromkeys(rules))}" for place, rules in problems.items()), key=position)
        more = [f"and {len(wrong) - 5 * MOST} more"] * (len(wrong) > 5 * MOST)
        raise RecipeError.of([*lines, *more]) from error


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of the files that hold such a value, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def dotted(path: Path) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))


def _enter(place: list[Any], part: str | int, path: Path, origin: str) -> Any:
    if not isinstance(part, int) or not 0 <= part < len(place):
        hint = f"`{dotted(path[:-1])}` has {len(place)} items, counted from 0"
        raise RecipeError(f"{origin}: there is no `{dotted(path)}`", hint=hint)
    return place[part]


def _walk(root: Node, file: str) -> Iterator[tuple[Path, Node, Node]]:
    """(path, key node, value node) of everything inside, as often as it is used; bounded in depth and in number."""
    waiting: list[tuple[Node, Path]] = [(root, ())]
    count = 0
    while waiting:
        node, path = waiting.pop()
        if isinstance(node, MappingNode):
            children = [((*path, _name(key)), key, value) for key, value in node.value]
        elif isinstance(node, SequenceNode):
            children = [((*path, index), value, value) for index, value in enumerate(node.value)]
        else:
            children = []
            if not str(node.value).isascii() and _SURROGATE.search(node.value):
                raise RecipeError(f"{_place(file, node)}: half of a surrogate pair is no text", hint=_PLAIN)
        count += len(children)
        if count > MOST_VALUES:
            raise RecipeError(f"{file}: more than {MOST_VALUES} values, aliases counted as often as they are used", hint=_PLAIN)
        if children and len(path) >= DEEPEST:
            raise RecipeError(f"{_place(file, node)}: nested deeper than {DEEPEST} levels", hint=_PLAIN)
        for child, key, value in children:
            yield child, key, value
            waiting.append((value, child))


def _name(key: Node) -> str:
    """A key as a part of a path; one that is no word is refused later."""
    return str(key.value) if isinstance(key, ScalarNode) else "?"


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
        shown = _written(error["input"][key]) if isinstance(error["input"], dict) else tag
        return f"{document.origin((*path, key))}: unknown {key} `{shown}`; ", near(tag, known)
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
    value = error["input"]
    if is_option and isinstance(value, float) and value.is_integer():
        value = int(value)  # as it was typed: `--limit 0` arrives as 0.0
    shown = f"`{origin} {value}`" if is_option else f"{origin}: `{name}: {_written(value)}`"
    return f"{shown}: ", rule[:1].lower() + rule[1:]


def _written(value: Any) -> str:
    """A value as YAML has it, on one line; text without its quotes."""
    return str(value) if isinstance(value, str | float) else json.dumps(value, ensure_ascii=False, default=str)


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
