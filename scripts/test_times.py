"""A table of the slowest test files, from the JUnit file of a run: `python scripts/test_times.py build/tests.xml`.

The time of a test is that of its worker, with its fixtures. Of the workers' sum, two processes that share the work take half.
"""

import argparse
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHOWN = 25


@dataclass
class File:
    """The tests of one file: how many, how long together, and the slowest."""

    name: str
    tests: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All tests together."""
        return sum(self.tests.values())

    @property
    def slowest(self) -> str:
        """The name of the test that takes longest."""
        return max(self.tests, key=lambda name: self.tests[name])


def read(path: Path) -> list[File]:
    """The files of a run, the slowest first."""
    files: dict[str, File] = {}
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 (pytest wrote it, here, a moment ago)
        module = case.get("classname", "")
        name = f"{module.replace('.', '/')}.py"
        tests = files.setdefault(name, File(name)).tests
        tests[case.get("name", "")] = float(case.get("time", 0))
    return sorted(files.values(), key=lambda each: -each.seconds)


def table(files: Sequence[File], shown: int = SHOWN) -> str:
    """A Markdown table of the slowest files, with the sum of all."""
    whole = sum(each.seconds for each in files)
    lines = ["| seconds | of all | tests | file | slowest test | its seconds |", "|---:|---:|---:|---|---|---:|"]
    for each in files[:shown]:
        share = each.seconds / whole if whole else 0.0
        slowest = f"`{each.slowest[:60]}` | {each.tests[each.slowest]:.1f}"
        lines.append(f"| {each.seconds:.1f} | {share:.0%} | {len(each.tests)} | `{each.name}` | {slowest} |")
    lines.append(f"| **{whole:.1f}** | | {sum(len(each.tests) for each in files)} | all {len(files)} files | | |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="How long each file of the tests takes.")
    parser.add_argument("junit", type=Path, help="what `pytest --junitxml` wrote")
    parser.add_argument("--shown", type=int, default=SHOWN, help="files in the table (default: %(default)s)")
    asked = parser.parse_args()
    print(table(read(asked.junit), asked.shown))


if __name__ == "__main__":
    main()
