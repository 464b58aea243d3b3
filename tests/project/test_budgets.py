"""The rules that keep the project readable, held by machine. Each check is also shown to fail on a bad sample."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc", "base", "legacy"}
TEXT_SUFFIXES = {"", ".py", ".cu", ".cuh", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".sh", ".jsonl"}
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:root|home/\w+|Users/\w+|work|mnt/\w+)(?=/)|\b[A-Z]:\\Users\\")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


size = _load(ROOT / "scripts" / "size.py")
SOURCES = list(size.source_files())
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- the rules: each takes a file's name and text and yields what is wrong with it -----------------------------------


def too_long(name: str, text: str) -> Iterator[str]:
    limit = size.LINES[Path(name).suffix]
    if size.count_lines(text) > limit:
        yield f"{name}: {size.count_lines(text)} lines, at most {limit}"


def large_functions(name: str, text: str) -> Iterator[str]:
    for found in size.functions(text):
        if found.lines > size.FUNCTION_LINES:
            yield f"{name}:{found.line}: `{found.name}` has {found.lines} lines, at most {size.FUNCTION_LINES}"
        if found.parameters > size.PARAMETERS and not name.startswith("marlin_tools/cli/"):
            yield f"{name}:{found.line}: `{found.name}` has {found.parameters} parameters, at most {size.PARAMETERS}"


def broad_excepts(name: str, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(c is None or (isinstance(c, ast.Name) and c.id in {"Exception", "BaseException"}) for c in caught):
                yield f"{name}:{node.lineno}: a broad `except`"


def globals_(name: str, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Global):
            yield f"{name}:{node.lineno}: `global {', '.join(node.names)}`"


def vague_names(name: str, _text: str) -> Iterator[str]:
    path = Path(name)
    if path.parts[0] == "kernels":  # kernels/common holds the device headers that all kernels share
        return
    for part in (*path.parts[:-1], path.stem):
        if part.lower().strip("_") in FORBIDDEN_NAMES or re.search(r"(^|_)(utils|helpers|manager)$", part):
            yield f"{name}: `{part}` does not say what is inside"


def missing_module_docstring(name: str, text: str) -> Iterator[str]:
    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        yield f"{name}: no module docstring"


def machine_paths(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if found := MACHINE_PATH.search(line):
            yield f"{name}:{number}: `{found.group()}` exists on one machine only"


PYTHON_RULES = [too_long, large_functions, broad_excepts, globals_, vague_names, missing_module_docstring]


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_follows(rule):
    assert PYTHON, "no sources found"

    assert [problem for path in PYTHON for problem in rule(_name(path), path.read_text(encoding="utf-8"))] == []


def test_cuda_files_are_short():
    cuda = [path for path in SOURCES if path.suffix != ".py"]

    assert [problem for path in cuda for problem in too_long(_name(path), path.read_text(encoding="utf-8"))] == []


def test_no_file_names_a_path_of_one_machine():
    tops = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    nested = [path for top in (*size.FOLDERS, ".ci") for path in (ROOT / top).rglob("*") if path.is_file()]
    texts = [path for path in tops + nested if path.suffix in TEXT_SUFFIXES and path != Path(__file__)]  # its samples are bad

    assert [problem for path in texts for problem in machine_paths(_name(path), path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("folder", ("kernels", "recipes", "scripts", "tests"))
def test_folder_is_not_a_package(folder):
    """A top-level `kernels` package, say, would shadow the one that transformers probes for."""
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_every_folder_of_the_package_is_a_package():
    """Without `__init__.py` the layers contract would not see what is inside; lm-eval loads the demo's tasks by path."""
    folders = {path.parent for path in PYTHON if _name(path).startswith("marlin_tools/")}
    folders -= {ROOT / "marlin_tools" / "demo" / "tasks"}

    assert [_name(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


# ---- every rule can fail ---------------------------------------------------------------------------------------------

BAD = [
    (too_long, "marlin_tools/x.py", "x = 1\n" * 401),
    (too_long, "kernels/x.cu", "//\n" * 801),
    (large_functions, "marlin_tools/x.py", "def f():\n" + "    x = 1\n" * 70),
    (large_functions, "marlin_tools/x.py", "@d(\n" + "    1,\n" * 68 + ")\ndef f():\n    pass\n"),
    (large_functions, "marlin_tools/x.py", "def f(a, b, /, c, d, *e, f, g, **h): pass\n"),
    (large_functions, "marlin_tools/x.py", "class C:\n    async def f(self, a, b, c, d, e, f, g, h): pass\n"),
    (broad_excepts, "marlin_tools/x.py", "try: f()\nexcept Exception: pass\n"),
    (broad_excepts, "marlin_tools/x.py", "try: f()\nexcept (ValueError, BaseException): pass\n"),
    (broad_excepts, "marlin_tools/x.py", "try: f()\nexcept: pass\n"),
    (globals_, "marlin_tools/x.py", "def f():\n    global x\n    x = 1\n"),
    (vague_names, "marlin_tools/utils.py", ""),
    (vague_names, "marlin_tools/helpers/x.py", ""),
    (vague_names, "tests/cli_helpers.py", ""),
    (vague_names, "marlin_tools/_base.py", ""),
    (missing_module_docstring, "marlin_tools/x.py", "x = 1\n"),
    (machine_paths, "README.md", "see /root/models/llama"),
    (machine_paths, "README.md", "`/home/ann/x`"),
    (machine_paths, "README.md", "C:\\Users\\ann"),
]
GOOD = [
    (too_long, "marlin_tools/x.py", "x = 1\n" * 400),
    (large_functions, "marlin_tools/x.py", "def f():\n" + "    x = 1\n" * 69),
    (large_functions, "marlin_tools/x.py", "class C:\n    def f(self, a, b, c, d, e, f, g): pass\n"),
    (large_functions, "marlin_tools/cli/make.py", "def f(a, b, c, d, e, f, g, h): pass\n"),
    (broad_excepts, "marlin_tools/x.py", "try: f()\nexcept (ValueError, OSError): pass\n"),
    (vague_names, "kernels/common/barrier.cuh", ""),
    (vague_names, "marlin_tools/database.py", ""),
    (machine_paths, "README.md", "runs/home/x https://example.org/work/x a/root/b"),
]


@pytest.mark.parametrize(("rule", "name", "text"), BAD)
def test_rule_finds_the_bad(rule, name, text):
    assert len(list(rule(name, text))) == 1


@pytest.mark.parametrize(("rule", "name", "text"), GOOD)
def test_rule_leaves_the_good(rule, name, text):
    assert list(rule(name, text)) == []
