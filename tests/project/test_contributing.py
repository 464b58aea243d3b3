"""CONTRIBUTING.md speaks of files that exist, and leaves none of the package's parts out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TREE = TEXT.partition("## The tree")[2].split("```")[1]
PACKAGE = TREE.partition("marlin_tools/\n")[2].partition("\nkernels/")[0]


def _leading_names(line: str) -> list[str]:
    return re.findall(r"[\w.]+(?:\.py|/)(?=\s|$)", line.strip().partition("   ")[0])


def test_every_path_exists():
    quoted = {path for path in re.findall(r"`([\w./-]+)`", TEXT) if "/" in path or path.endswith((".md", ".txt", ".toml"))}

    assert len(quoted) > 20
    assert [path for path in sorted(quoted) if not (ROOT / path).exists()] == []


def test_the_tree_is_the_package():
    told = {name.rstrip("/") for line in PACKAGE.splitlines() for name in _leading_names(line)}
    there = {
        path.name for path in (ROOT / "marlin_tools").iterdir() if not path.name.startswith("__") and path.suffix != ".typed"
    }

    assert told - {"__init__.py"} == there


@pytest.mark.parametrize("target", re.findall(r"make ([a-z-]+)", TEXT))
def test_make_knows_the_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
