"""Recipes that are meant to hurt: refused within seconds, in few lines, with the place where they are wrong."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from marlin_tools.errors import RecipeError
from marlin_tools.recipe.files import check, load
from marlin_tools.recipe.yaml_reader import parse_value

HEAD = "name: a\nmodel: demo\nstages:\n  - stage: quantize\n"
LETTERS = "abcdefghij"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise(LETTERS)
)
MERGES = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 999)}], {new}: 1}}\n" for old, new in pairwise(LETTERS)
)
CASES = {
    "an alias bomb": (BOMB, "more than 20000 values"),
    "a bomb of merges": (MERGES + HEAD, "more than 20000 values"),
    "a mapping that takes itself in": ("a: &a {<<: *a}\n" + HEAD, "1:8: `<<` takes mappings that stand above"),
    "a mapping that takes in what it is in": ("a: &a {b: {c: 1, <<: *a}}\n" + HEAD, "`<<` takes mappings that stand above"),
    "a word taken in": ("a: {<<: x}\n" + HEAD, "1:5: `<<` takes mappings that stand above"),
    "two of the same key where one comes from elsewhere": (
        "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n" + HEAD,
        "2:19: found duplicate",
    ),
    "a list in itself": ("a: &a [*a]\n" + HEAD, "nested deeper than 32"),
    "a mapping in itself": ("a: &a {b: *a}\n" + HEAD, "nested deeper than 32"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 32"),
    "deep blocks": ("\n".join(" " * level + "k:" for level in range(100)), "nested deeper than 32"),
    "deep dashes": ("a:\n " + "- " * 5000 + "x", "nested deeper|recursion"),
    "many keys": (HEAD + "".join(f"k{number}: 1\n" for number in range(4000)), "unknown key `k0`"),
    "many keys of a stage": (HEAD + "".join(f"    k{number}: 1\n" for number in range(3000)), "unknown key `k0` in `quantize`"),
    "a long line": (HEAD + "description: " + "x" * 20_000_000, "bytes, at most"),
    "a large file": (HEAD + "description: " + "x" * 100_000, "characters, at most"),
    "many digits": (HEAD + "seed: " + "9" * 5000, "not YAML"),
    "half a surrogate pair": ('name: "\\ud800"\nmodel: demo\nstages: [{stage: verify}]', "surrogate pair"),
    "its own control": ("control: a\n" + HEAD, "is its own control"),
    "a date that is none": (HEAD + "description: 2001-99-99\n", "not YAML"),
    "bytes that are none": (HEAD + "description: !!binary x\n", "base64"),
    "a key that is a mapping": ("? {a: b}\n: c\n" + HEAD, "unhashable"),
    "a key that is a list": ("? [a]\n: c\n" + HEAD, "keys should be strings"),
    "code": ("!!python/object:os.system x", "expected `key: value`"),
    "a zero byte": ("a\0b: c", "not YAML"),
    "a name with a line in it": (HEAD + '"a\\nerror: x\\u001b[31m": 1', r"unknown key `a\\nerror: x\\x1b\[31m`"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(60)
def test_a_hostile_recipe_is_refused_in_time(tmp_path: Path, case: str) -> None:
    text, rule = CASES[case]
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    for read in (load, check):
        begin = time.perf_counter()
        with pytest.raises(RecipeError, match=rule) as refusal:
            read(file)
        assert time.perf_counter() - begin < 20
        assert len(refusal.value.lines) <= 21
        assert all(len(line) <= 500 and line.isprintable() for line in refusal.value.lines)


def test_aliases_are_welcome(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: a\nmodel: &m demo\nstages:\n  - {stage: evaluate, tasks: [demo_qa], baseline: *m}\n")

    assert "demo" == load(file).stages[0].baseline


@pytest.mark.filterwarnings("error")
def test_a_name_may_be_given_again_without_a_word_of_the_library(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: &m a\nmodel: &m demo\nstages:\n  - {stage: evaluate, tasks: [demo_qa], baseline: *m}\n")

    assert "demo" == load(file).stages[0].baseline


LONG_HEX = "0x" + "f" * 5000  # Python reads it, and prints no more than 4300 digits


@pytest.mark.parametrize("text", ["*a", "&a [*a]", "[" * 200, '"\\ud800"', "9" * 6000, "!!int x", "x" * 70_000, LONG_HEX])
def test_a_hostile_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_value(text)


def test_a_pipe_and_bytes_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="no UTF-8 at byte 0"):
        load(tmp_path / "x.yaml")
