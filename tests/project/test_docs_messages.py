"""Every message that the page on troubleshooting quotes is still one that the program can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [line.removeprefix("### ") for line in PAGE.splitlines() if line.startswith("### ")]
LEAST = 7
"""Letters that a text of the source needs before it can stand for a message."""


def _patterns() -> Iterator[re.Pattern[str]]:
    """Every text of the package that has words in it, its values left open."""
    for path in sorted((ROOT / "marlin_tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            words = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None for part in parts]
            if sum(sum(map(str.isalpha, word)) for word in words if word) >= LEAST:
                yield re.compile("".join(".*" if word is None else re.escape(word) for word in words), re.DOTALL)


PATTERNS = list(_patterns())


def _occurs(message: str) -> bool:
    return any(pattern.fullmatch(message) or pattern.fullmatch(message.partition(": ")[2]) for pattern in PATTERNS)


def test_every_message_is_one_of_ours() -> None:
    assert len(QUOTED) >= 25
    assert [message for message in QUOTED if not _occurs(message)] == []


def test_another_message_would_be_found() -> None:
    assert not _occurs("`my-model` is neither here nor there")


def test_every_message_has_a_cause_and_a_next_step() -> None:
    entries = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]

    assert [entry.splitlines()[0] for entry in entries if "\n- Cause: " not in entry or "\n- Next: " not in entry] == []
