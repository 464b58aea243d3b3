"""The worked examples of `docs/extending.md` are run as they stand there; the page of the Python API names what there is."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import marlin_tools as mt
from marlin_tools import families
from marlin_tools.algorithms import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def _blocks(section: str) -> list[tuple[str, str]]:
    """(title, code) of the Python blocks of a section."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r'^```python title="(.*?)"\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def _new_file(title: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The block as the module of the package that it would be."""
    name = title.removesuffix(".py").replace("/", ".")
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, title, "exec"), module.__dict__)  # noqa: S102 (our own page)
    return module


def _run(title: str, code: str) -> None:
    exec(compile(code, title, "exec"), {"__name__": title})  # noqa: S102


def test_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (title, code), (_, line), (_, script) = _blocks("An algorithm")
    _new_file(title, code, monkeypatch)
    try:
        _run("one line", line)
        _run("script", script)
    finally:
        PRESETS.pop("searched", None)

    values = dict(re.findall(r"(\w+): mean KL to the original (\S+)", capsys.readouterr().out))
    assert 0 < float(values["searched"]) < float(values["rtn"])


def test_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    (title, code), (_, script) = _blocks("A weight format")
    _new_file(title, code, monkeypatch)

    _run("script", script)


def test_a_family(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (title, code), (_, script) = _blocks("A model family")
    assert "persimmon" not in families.known_types()
    _new_file(title, code, monkeypatch)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, "persimmon"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-persimmon").symlink_to(tiny_model("persimmon"))

    _run("script", script)


def test_the_example_of_the_api_uses_public_names_and_the_page_has_them_all() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)\.(\w+)$", page, re.MULTILINE)

    assert set(re.findall(r"\bmt\.(\w+)", page)) <= set(mt.__all__)
    assert set(mt.__all__) <= {name for _, name in shown}
    for module, name in shown:
        assert hasattr(importlib.import_module(module), name)
