"""Patterns that people bring are matched in bounded time, or refused."""

import re
import time

import pytest

from marlin_tools.checkpoint.patterns import compiled
from marlin_tools.errors import FormatError, RecipeError

NAMES = [
    f"model.layers.{block}.{part}" for block in range(80) for part in ("self_attn.q_proj", "mlp.down_proj", "a" * 40 + "!")
]

USUAL = [
    "down_proj", "down_proj$", ".*", r"layers\.(0|1|31)\.", r"^model\.layers\.\d+\.mlp\.(gate|up)_proj$", "lm_head|.*router.*",
    r"^(?!.*self_attn).*$", r"model\.layers\.[0-3]?[02468]\..*\.v_proj", r"(?i)MLP", r"re.*\.layers\.(?:[0-9]|1[0-9])\.", "",
]  # fmt: skip
HOSTILE = [
    "(a+)+$", "(a*)*b", "(a|a)*b", "(a|aa)+$", "([a-z]+)*!$", "(.*)*x", "(.*.*)*x", "((a?){10}){10}x", "(?:a{1,9}){1,9}x",
    ".*.*.*.*.*x", "a*a*a*a*a*a*b", "a?" * 30 + "a" * 30, "(a|b|ab)*c", r"(a)\1", "(?=(a+)+$)", "(x+x+)+y", "(a|a)" * 25,
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_mean_what_they_mean_in_python(pattern: str) -> None:
    found = compiled(pattern, "--ignore")

    assert [bool(re.search(pattern, name)) for name in NAMES] == [bool(found.search(name)) for name in NAMES]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="could take very long") as refusal:
        compiled(pattern, "--ignore")
    assert refusal.value.hint


@pytest.mark.parametrize("pattern", ["(", "[", "*a", "(?P<a", "a{99999999999}", "(" * 5000, "x" * 1001, "\\"])
def test_patterns_that_are_none_are_refused(pattern: str) -> None:
    with pytest.raises(FormatError, match=r"no regular expression|at most 1000"):
        compiled(pattern, "config.json:", FormatError)


@pytest.mark.parametrize("pattern", [".*.*.*x", "a*a*a*x", "[a-z.]*[a-z.]*[a-z.]*0"])
def test_the_slowest_that_are_allowed_are_fast_enough(pattern: str) -> None:
    found, begin = compiled(pattern, "--ignore"), time.perf_counter()
    for name in NAMES[:60]:
        found.search(name)

    assert time.perf_counter() - begin < 10
