"""`--help` of every verb is frozen in `help/`.

After a deliberate change, write the files anew:

.venv/bin/python tests/cli/test_help.py
"""

from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from marlin_tools.cli import app

FOLDER = Path(__file__).parent / "help"
VERBS = get_command(app).commands
PAGES = ["", *VERBS, *(f"{verb} {part}" for verb, group in VERBS.items() for part in getattr(group, "commands", ()))]


def page(verb: str) -> str:
    return CliRunner().invoke(app, [*verb.split(), "--help"], prog_name="marlin-tools", env={"COLUMNS": "40"}).output


def file(verb: str) -> Path:
    return FOLDER / f"{verb.replace(' ', '-') or 'marlin-tools'}.txt"


@pytest.mark.parametrize("verb", PAGES)
def test_help_is_as_committed(verb):
    assert file(verb).read_text(encoding="utf-8") == page(verb)


def test_every_page_belongs_to_a_verb():
    assert {file(verb) for verb in PAGES} == set(FOLDER.iterdir())


def test_verbs_are_those_of_this_version():
    """What is planned for later is absent, not stubbed."""
    expected = "quantize prune finetune export eval generate run reproduce verify compare inspect doctor recipes bench kernels"
    assert expected.split() == list(VERBS)


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for verb in PAGES:
        file(verb).write_text(page(verb), encoding="utf-8")
