"""Every command that a page shows is one that works, and every recipe in it is a recipe."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from marlin_tools import __all__ as public_names
from marlin_tools.cli import app
from marlin_tools.recipe import bundled, find, load
from marlin_tools.resources import recipes_dir

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", recipes_dir() / "README.md"]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


COMMANDS = [
    line for page in PAGES for block in _blocks(page, "sh") for line in block.splitlines() if line.startswith("marlin-tools ")
]
COMMANDS += [
    line.lstrip("# ").partition("     ")[0].strip()
    for path in bundled().values()
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith("#     marlin-tools ")
]


def test_there_are_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(asked, command):
    Path("runs/newest").mkdir(parents=True)  # for `eval` without MODEL
    Path("runs/newest/manifest.json").touch()
    recipe = asked(*shlex.split(command)[1:]).recipe

    assert recipe.model.startswith(("demo", "llama2-7b", "runs/"))


def test_results_are_where_the_readme_looks_for_them(asked):
    """`quantize demo` writes what the following lines read."""
    recipe = asked("quantize", "demo").recipe

    assert f"runs/{recipe.name}-{recipe.scheme}" in " ".join(COMMANDS)


def test_the_table_of_verbs_is_complete():
    (table,) = re.findall(r"\| verb \| does \|\n.*?\n\n", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)

    assert set(get_command(app).commands) == set(re.findall(r"^\| `([a-z]+)", table, re.MULTILINE))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for block in _blocks(PAGES[0], "sh") for target in re.findall(r"\bmake (\w+)", block)}

    assert {"demo", "test"} == targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_python_example_uses_public_names():
    (block,) = _blocks(PAGES[0], "python")

    assert set(re.findall(r"\bmt\.(\w+)", block)) <= set(public_names)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target


def test_the_recipe_in_the_readme_is_one(tmp_path):
    (block,) = _blocks(PAGES[1], "yaml")
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")

    assert ["quantize", "export", "evaluate", "verify"] == [stage.stage for stage in load(tmp_path / "my.yaml").stages]


def test_settings_in_the_readme_exist():
    text = PAGES[1].read_text(encoding="utf-8")

    for override in re.findall(r"`--set (\S+?)`", text):
        load(find("demo"), [override])
