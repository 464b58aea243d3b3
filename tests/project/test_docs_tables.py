"""The tables of the README are those of the pages behind them, its picture is drawn from the same; no verb is left out."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from marlin_tools.algorithms import GPTQ, PRESETS
from marlin_tools.backends import BACKENDS
from marlin_tools.families import known_types

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hooks = _script("site_hooks")


def _tables(text: str) -> list[list[list[str]]]:
    """All tables: rows of cells, the header first, the line under it left out."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


def _source(page: str, label: str) -> dict[str, str]:
    """The first row of a page's tables with this label, by header."""
    for head, *rows in _tables((ROOT / page).read_text(encoding="utf-8")):
        for row in rows:
            if row[0] == label:
                return dict(zip(head, row, strict=True))
    raise LookupError(f"{page}: {label}")


def test_there_is_a_table_for_each_claim() -> None:
    assert ["batch", "method", "format"] == [table[0][0] for table in _tables(README)]
    assert len(README.splitlines()) <= 110


def test_speed_is_that_of_the_page_on_serving() -> None:
    head, *rows = _tables(README)[0]

    assert 4 == len(rows)
    for row in rows:
        source = _source("docs/serving.md", row[0])
        assert [source[batch] for batch in head[1:]] == row[1:]


def test_accuracy_is_that_of_the_page_on_accuracy() -> None:
    _, *rows = _tables(README)[1]

    assert 6 == len(rows)
    for label, *numbers in rows:
        _, *source = _source("docs/accuracy.md", label).values()
        assert [re.findall(r"[\d.]+", cell)[0] for cell in source] == [cell.strip("*") for cell in numbers]


def test_what_loads_where_is_that_of_the_page_on_formats() -> None:
    head, *rows = _tables(README)[2]
    page = (ROOT / "marlin_tools" / "formats" / "README.md").read_text(encoding="utf-8")
    table = next(table for table in _tables(page) if "vLLM" in table[0])

    assert 4 == len(rows)
    for label, *told in rows:
        (name,) = re.findall(r"`([\w-]+)`", label)
        source = next(dict(zip(table[0], row, strict=True)) for row in table if row[0] == f"`{name}`")
        for engine, cell in zip(head[1:], told, strict=True):
            assert source[engine].startswith(cell.partition(";")[0]), (name, engine)


def test_the_picture_is_drawn_from_the_tables() -> None:
    script = _script("draw_overview")

    assert script.draw() == script.PICTURE.read_text(encoding="utf-8")


def test_every_verb_has_its_options_on_the_page() -> None:
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")

    assert sorted(hooks.verbs()) == sorted(hooks.MARKER.findall(page))
    assert "| <code>-o, --output DIR</code> |" in hooks.options("quantize")


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("docs/serving.md", "[x](../recipes/README.md#tables)", "[x](recipes.md#tables)"),
        ("docs/notes/index.md", "[x](../../kernels/README.md)", "[x](../kernels.md)"),
        ("recipes/README.md", "[demo](demo.yaml)", "[demo](bundled-recipes.md#demo)"),
        ("marlin_tools/formats/README.md", "[gptq.py](gptq.py)", "[gptq.py](layouts.md#gptq)"),
        ("docs/api.md", "[x](../examples/quantize.py)", "[x](examples.md#quantize)"),
        ("docs/concepts.md", "![x](img/gptq.svg)", "![x](img/gptq.svg)"),
        ("CONTRIBUTING.md", "[x](Makefile)", "x"),
        ("docs/api.md", "[x](nowhere.md)", "[x](nowhere.md)"),
        ("docs/api.md", "```\n[x](../recipes/README.md)\n```", "```\n[x](../recipes/README.md)\n```"),
    ],
)
def test_links_lead_to_the_page_of_a_file(source: str, link: str, expected: str) -> None:
    assert expected == hooks.links(link, source)


def test_lists_of_fields_become_tables() -> None:
    docstrings = pytest.importorskip("griffe") and _script("site_docstrings")

    assert [("a", "first, and more"), ("b, c", "second")] == docstrings.rows("a       first,\n        and more\nb, c    second")
    assert [] == docstrings.rows("Just a sentence.\nAnd another.")


def test_the_presets_are_those_of_the_program() -> None:
    table = next(
        table for table in _tables((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")) if table[0][0] == "preset"
    )

    assert [f"`{name}`" for name in PRESETS] == [row[0] for row in table[1:]]
    told = "as `default`, rows make up for each other, then each block is tuned"
    assert table[-1][1:] == [told, "", "", "three quarters", "yes"]
    assert PRESETS["max"] == PRESETS["default"].model_copy(update={"drift": 0.75, "guided": True})
    for name, scales, order, polish, drift, text in table[1:-1]:
        preset = PRESETS[name.strip("`")]
        assert preset.needs_data == (text == "yes")
        if isinstance(preset, GPTQ):
            found = {"conditional": "searched as the sweep goes", "diagonal": "searched before"}[preset.scales]
            assert f"{found}, {'signed' if preset.signed else 'positive'}" == scales
            assert {"natural": "natural", "energy": "by energy"}[preset.order] == order
            assert ({0: "no", 1: "one round"}[preset.polish], {0: "no", 0.5: "half"}[preset.drift]) == (polish, drift)
        else:
            assert ("absmax", "", "", "") == (scales, order, polish, drift)


def test_every_type_that_works_is_named_once() -> None:
    """`..._text` is what a larger model calls its language model; of those only some are models of their own."""
    tables = _tables((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    rows = [row for head, *rows in tables if head[-1] == "`model_type`" for row in rows]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[-1])]

    assert sorted(named) == sorted(set(named))
    assert {name for name in known_types() if not name.endswith("_text")} <= set(named) <= set(known_types())


def test_backends_are_those_of_the_program() -> None:
    verbs = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")
    table = next(table for table in _tables(verbs) if table[0][0] == "backend")
    said = _source("docs/glossary.md", "backend")["meaning"]

    assert {"`auto`", "`vllm`", *(f"`{name}`" for name in BACKENDS)} == {row[0] for row in table[1:]}
    assert {"vllm", *BACKENDS} == set(re.findall(r"`([\w-]+)`", said))


def test_sources_that_the_page_on_kernels_names_are_there() -> None:
    """Braces stand for several files; paths begin in `kernels/`, in the package or at the top."""
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w*{},-]+\.(?:cuh?|py|json))`", page))
    several = {name: re.findall(r"[\w*-]+", braces[1]) for name in named if (braces := re.search(r"{(.*)}", name))}
    names = (named - set(several)) | {re.sub(r"{.*}", each, name) for name, inside in several.items() for each in inside}

    assert len(names) > 20
    assert [n for n in sorted(names) if not any(list((ROOT / top).glob(n)) for top in ("kernels", "marlin_tools", "."))] == []


def test_nothing_is_installed_by_a_name_that_no_index_knows() -> None:
    """Whoever takes the name there would have his code run; until there is a release, a clone is installed."""
    assert "There is no release on a package index yet" in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    folders = ("docs", "marlin_tools", "examples", "recipes", "kernels", "scripts")
    texts = [*ROOT.glob("*.md"), *(path for top in folders for path in (ROOT / top).rglob("*"))]
    asked = re.compile(r"\b(?:pip install |install `)[^`\n|]*\bmarlin-tools")

    assert [
        (path.name, found.group())
        for path in texts
        if path.suffix in {".md", ".py", ".j2", ".ipynb"}
        for found in asked.finditer(path.read_text(encoding="utf-8"))
    ] == []
