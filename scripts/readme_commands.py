"""Print the commands of the first pages that need nothing but this machine, in their order: CI runs them.

    python scripts/readme_commands.py | bash -eux

A block of commands whose first line is a comment that begins with `# needs` is left to people, and so are
all other pages. `tests/cli/test_readme.py` holds that what is left uses the embedded model alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/index.md", "recipes/README.md", "marlin_tools/formats/README.md")


def blocks(text: str) -> list[list[str]]:
    """The lines of every `sh` block of a page."""
    return [found.splitlines() for found in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def commands(text: str) -> Iterator[str]:
    """Our own commands in the blocks that anyone can run."""
    for lines in blocks(text):
        if not lines[0].startswith("# needs"):
            yield from (line for line in lines if line.startswith("marlin-tools "))


def main() -> None:
    """All pages, each command once."""
    every = [line for page in PAGES for line in commands((ROOT / page).read_text(encoding="utf-8"))]
    print("rm -rf runs/readme && mkdir -p runs/readme && cd runs/readme")
    print("\n".join(dict.fromkeys(every)))


if __name__ == "__main__":
    main()
