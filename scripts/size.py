"""Print the size of the project against its budgets: `python scripts/size.py`.

The budgets keep every file readable in one sitting. `tests/project/test_budgets.py` holds the tree to the same numbers.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("marlin_tools", "kernels", "recipes", "scripts", "examples", "tests")
LINES = {".py": 400, ".cu": 800, ".cuh": 800}
FUNCTION_LINES = 70
PARAMETERS = 7


@dataclass(frozen=True)
class Function:
    """One `def`: where it is, how long it is with its docstring and decorators, and how many arguments a caller can pass."""

    name: str
    line: int
    lines: int
    parameters: int


def source_files() -> Iterator[Path]:
    """All Python and CUDA files of the project, in a fixed order."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in LINES and "__pycache__" not in path.parts:
                yield path


def count_lines(text: str) -> int:
    """Lines as an editor numbers them."""
    return len(text.splitlines())


def functions(source: str) -> list[Function]:
    """Every function and method, nested ones too; `self` and `cls` are not parameters."""
    tree = ast.parse(source)
    methods = {item for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bound = node in methods and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            given += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = (node.end_lineno or node.lineno) - first + 1
            found.append(Function(node.name, node.lineno, lines, len(given) - bound))
    return found


def main() -> None:
    """One row per package: files, lines, and the largest of each kind with its limit."""
    rows: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path in source_files():
        relative = path.relative_to(ROOT)
        room = "/".join(relative.parts[:2]) if len(relative.parts) > 2 else relative.parts[0]
        rows[room].append((relative, path.read_text(encoding="utf-8")))
    print(f"{'':<28}{'files':>6}{'lines':>8}{'median':>8}  longest file (of its limit)  longest function (of {FUNCTION_LINES})")
    for room, members in rows.items():
        sizes = [count_lines(text) for _, text in members]
        relative, text = max(members, key=lambda member: count_lines(member[1]) / LINES[member[0].suffix])
        every = [(found.lines, found.name) for path, source in members if path.suffix == ".py" for found in functions(source)]
        function = "`{1}` {0}".format(*max(every)) if every else ""
        limit = LINES[relative.suffix]
        print(
            f"{room:<28}{len(members):>6}{sum(sizes):>8}{median(sizes):>8.0f}"
            f"  `{relative.name}` {count_lines(text)}/{limit}  {function}"
        )
    package = [text for room, members in rows.items() if room.startswith("marlin_tools") for _, text in members]
    print(f"{'marlin_tools in all':<28}{len(package):>6}{sum(map(count_lines, package)):>8}")


if __name__ == "__main__":
    main()
