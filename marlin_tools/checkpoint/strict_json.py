"""JSON from files that anybody may have made: bounded in size, depth and digits, no key twice, and every failure is ours.

`read_object` is the only way in which the files of a model directory become values; `conforms` holds them against a pydantic
model of what is expected (`contract.py`). An error names the file, the key and the rule.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from marlin_tools.errors import MarlinToolsError, ModelError

DEEPEST = 64
"""Levels of nesting."""

DIGITS = 40
"""Digits of an integer; 64 bits need 19, and tokenizers know a length of 31."""

LARGEST = 64 << 20
"""Bytes of a file."""

HINT = "download the file again"

READABLE = "let this user read it: `chmod u+r`, or as its owner `chmod a+r`"


def read_object(path: Path, kind: type[MarlinToolsError] = ModelError, hint: str = HINT) -> dict[str, Any]:
    """The JSON object in a file; `kind` is raised if it is no file, too large or not such an object."""
    return parse_object(read_bounded(path, kind, hint), str(path), kind, hint)


def read_bounded(path: Path, kind: type[MarlinToolsError], hint: str, limit: int = LARGEST) -> bytes:
    """The content of an ordinary file; a pipe would wait for ever, a device never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise kind(f"`{path}` is not an ordinary file", hint=hint)
            if found.st_size > limit:
                raise kind(f"`{path}` has {found.st_size} bytes, at most {limit} are read", hint=hint)
            return stream.read(limit)
    except (OSError, ValueError) as error:
        hint = READABLE if isinstance(error, PermissionError) else hint
        raise kind(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}", hint=hint) from error


def parse_object(content: bytes, where: str, kind: type[MarlinToolsError] = ModelError, hint: str = HINT) -> dict[str, Any]:
    """The JSON object that these bytes are."""
    value = parse(content, where, kind, hint)
    if not isinstance(value, dict):
        raise kind(f"`{where}` is not a JSON object", hint=hint)
    return value


def parse(content: bytes | str, where: str, kind: type[MarlinToolsError] = ModelError, hint: str = HINT) -> Any:
    """The JSON value that this text is; `where` is the place that an error names."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_without_repetition
        )
        _check_depth(value)
        if "\\u" in text:  # the only way to a lone half of a surrogate pair, which no file can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise kind(f"`{where}` cannot be read as JSON: nested deeper than {DEEPEST} levels", hint=hint) from error
    except UnicodeEncodeError as error:
        raise kind(f"`{where}` cannot be read as JSON: it holds half of a surrogate pair", hint=hint) from error
    except ValueError as error:
        raise kind(f"`{where}` cannot be read as JSON: {error}", hint=hint) from error
    return value


def conforms(model: type[BaseModel], value: Any, where: str, hint: str = HINT) -> None:
    """Raise ModelError with the first key of `value` that is not what `model` says."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained", "function-")))
        rule = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if first["type"] == "missing":
            raise ModelError(f"`{where}`: `{key}` is missing", hint=hint) from error
        shown = _shown(first["input"])
        raise ModelError(f"`{where}`: `{key}` {rule[:1].lower()}{rule[1:]}, not `{shown}`", hint=hint) from error


def _shown(value: object) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"`{text[:30]}` is no finite number")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"`{text}` is no JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        left = dict.fromkeys((name for name, _ in pairs), 0)
        for name, _ in pairs:
            left[name] += 1
        raise ValueError(f"the key `{next(name for name, count in left.items() if count > 1)}` stands twice")
    return found


def _check_depth(value: Any) -> None:
    """Level by level, so that no nesting can exhaust the stack."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        parts = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in parts if isinstance(inner, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
