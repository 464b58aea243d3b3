"""Who may import which third-party library, and when: `--help` must not pay for what it does not use.

The order of our own modules is import-linter's business (`pyproject.toml`), run here too so that plain pytest sees it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "marlin_tools"

# library -> the only files (or folders, ending in /) that may import it at all
ONLY = {
    "rich": ("cli/ui.py",),
    "typer": ("cli/",),
    "lm_eval": ("evaluation/harness.py", "evaluation/judge.py", "evaluation/task_index.py", "backends/"),
    "matplotlib": ("plotting.py",),
}
# What `marlin-tools --help` loads, and what none of it may import at module level.
LIGHT = ("__init__.py", "__main__.py", "cli/", "errors.py", "events.py", "resources.py")
HEAVY = {
    "cuda",
    "datasets",
    "lm_eval",
    "matplotlib",
    "numpy",
    "pydantic",
    "safetensors",
    "sentencepiece",
    "torch",
    "transformers",
}


def _libraries(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        yield node.module.partition(".")[0]


def _at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs on import: not the bodies of functions, not what is only for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _at_module_level(child)


def fenced_imports(name: str, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        for library in _libraries(node):
            if library in ONLY and not name.startswith(ONLY[library]):
                yield f"{name}:{node.lineno}: `{library}` belongs to {', '.join(ONLY[library])}"


def heavy_imports(name: str, text: str) -> Iterator[str]:
    if name.startswith(LIGHT):
        for node in _at_module_level(ast.parse(text)):
            heavy = HEAVY.intersection(_libraries(node))
            yield from (f"{name}:{node.lineno}: `{library}` at module level" for library in sorted(heavy))


@pytest.mark.parametrize("rule", (fenced_imports, heavy_imports), ids=lambda rule: rule.__name__)
def test_package_follows(rule):
    files = sorted(PACKAGE.rglob("*.py"))

    assert len(files) >= len(LIGHT)
    assert [p for path in files for p in rule(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", LIGHT)
def test_light_module_exists(name):
    """A renamed file would silently leave the rule."""
    assert (PACKAGE / name).exists()


@pytest.mark.parametrize(
    ("rule", "name", "text", "problems"),
    (
        (fenced_imports, "run.py", "def f():\n    from rich.table import Table\n", 1),
        (fenced_imports, "cli/ui.py", "from rich.table import Table\n", 0),
        (fenced_imports, "run/plan.py", "import typer\n", 1),
        (fenced_imports, "compress/quantize.py", "import lm_eval.api\n", 1),
        (fenced_imports, "backends/native.py", "import lm_eval.api\n", 0),
        (heavy_imports, "cli/make.py", "import torch.nn\n", 1),
        (heavy_imports, "cli/make.py", "class C:\n    from torch import nn\n", 1),
        (heavy_imports, "cli/make.py", "try:\n    import torch\nexcept ImportError:\n    pass\n", 1),
        (heavy_imports, "cli/make.py", "def f():\n    import torch\n", 0),
        (heavy_imports, "cli/ui.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n", 0),
        (heavy_imports, "stream.py", "import torch\n", 0),
    ),
)
def test_rules_judge_as_they_should(rule, name, text, problems):
    assert len(list(rule(name, text))) == problems


def _lint_imports(cwd: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_imports_of_the_package_point_down():
    done = _lint_imports(ROOT)

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_upward_import_is_found(tmp_path):
    """The same contract on a copy of the package whose lowest module reaches up."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with (tmp_path / "marlin_tools" / "errors.py").open("a", encoding="utf-8") as stream:
        stream.write("\nfrom marlin_tools import quantized\n")
    done = _lint_imports(tmp_path)

    assert done.returncode == 1
    assert "marlin_tools.errors -> marlin_tools.quantized" in done.stdout


@pytest.mark.parametrize("name", ("transformers", "datasets"))
def test_our_folders_shadow_nobody(name):
    """From the root of a checkout, where `kernels/`, `recipes/`, `scripts/` and `tests/` lie beside the package."""
    code = f"import sys; sys.path.insert(0, '.'); import {name}; print(getattr(sys.modules.get('kernels'), '__file__', None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
