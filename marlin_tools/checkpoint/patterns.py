"""Regular expressions that users and config.json files bring: matched in bounded time, or refused.

Python's engine tries alternatives one after the other, so some patterns take exponentially long on a name of forty characters.
How long one may take is estimated from its structure: a repetition without an end multiplies the ways to match by the length of
a name, an optional part by two, a choice by its number of branches. Inside of another repetition none of them may stand.
"""

import re
from functools import cache
from importlib import import_module
from typing import Any

from marlin_tools.errors import MarlinToolsError, RecipeError

LONGEST = 1000
"""Characters of a pattern."""

_NAME = 64
"""About as many characters as the name of a linear has."""

_MOST_WAYS = 4 * _NAME**3

_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})


@cache
def compiled(pattern: str, source: str, kind: type[MarlinToolsError] = RecipeError) -> re.Pattern[str]:
    """The pattern, ready to be matched with names; `source` says in an error where it comes from."""
    hint = "for example: 'down_proj$', or 'layers\\.(0|31)\\.'"
    if len(pattern) > LONGEST:
        raise kind(f"{source}: a pattern of {len(pattern)} characters, at most {LONGEST} are read", hint=hint)
    try:
        found = re.compile(pattern)
        ways = _ways(import_module("re._parser").parse(pattern), repeated=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise kind(f"{source} `{pattern}` is no regular expression: {error}", hint=hint) from error
    if ways > _MOST_WAYS:
        raise kind(f"{source} `{pattern}` could take very long to match: simplify its repetitions", hint=hint)
    return found


def _ways(parts: Any, *, repeated: bool) -> float:
    """At most how many ways there are to match a sequence of parts."""
    product = 1.0
    for operator, argument in parts:
        product *= _ways_of(str(operator), argument, repeated=repeated)
        if product > _MOST_WAYS:
            break
    return product


def _ways_of(operator: str, argument: Any, *, repeated: bool) -> float:
    if operator in _REPEATS:
        least, most, body = argument
        if most <= 1 and least == most:
            return _ways(body, repeated=repeated)
        inner = _ways(body, repeated=True)
        return float("inf") if repeated or inner > 1 else min(_NAME, int(most) - least + 1)
    if operator == "BRANCH":
        return float("inf") if repeated else sum(_ways(branch, repeated=False) for branch in argument[1])
    if operator in {"SUBPATTERN", "ATOMIC_GROUP"}:
        return _ways(argument[-1] if operator == "SUBPATTERN" else argument, repeated=repeated)
    if operator in {"ASSERT", "ASSERT_NOT"}:
        return _ways(argument[1], repeated=repeated)
    return float("inf") if operator.startswith("GROUPREF") else 1.0
