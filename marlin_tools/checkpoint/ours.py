"""By what a directory is known as a result of ours, and what in it is not: none of that is ever replaced."""

from pathlib import Path
from typing import Any

from marlin_tools.checkpoint.strict_json import read_object
from marlin_tools.errors import OutputError

MANIFEST, TOOL = "manifest.json", "marlin-tools"
"""What a directory that we wrote is known by: this file, and who it says wrote it."""

BESIDE = frozenset({MANIFEST, "recipe.yaml", "report.html", "README.md", "evaluation.json"})
"""What a result holds besides the files that its manifest lists."""


def listed_in(directory: Path) -> dict[str, Any] | None:
    """The files that a finished result of ours lists; None of any other directory, whatever manifest.json it has."""
    try:
        content = read_object(directory / MANIFEST, OutputError)
    except OutputError:
        return None
    tool, listed = content.get("tool"), content.get("files")
    ours = isinstance(tool, dict) and tool.get("name") == TOOL
    return listed if ours and isinstance(listed, dict) else None


def not_ours(directory: Path) -> str | None:
    """Why a directory is none of our results, or what lies in it that its manifest does not know."""
    listed = listed_in(directory)
    if listed is None:
        return f"has no {MANIFEST} of ours"
    folders = {Path(name).parts[0] for name in listed if "/" in name}
    for entry in sorted(directory.iterdir()):
        known = entry.name in BESIDE or entry.name.endswith(".tmp") or entry.name in listed or entry.name in folders
        if not known:
            return f"`{entry.name}` in it is no part of a result"
        if entry.name in folders and (
            more := sorted(e.name for e in entry.iterdir() if f"{entry.name}/{e.name}" not in listed)
        ):
            return f"`{entry.name}/{more[0]}` in it is no part of a result"
    return None
